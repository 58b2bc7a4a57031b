"""The front door, wiring only: from a name to a model that runs, and back to files."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebius import arguments, checkpoint, model_folder
from moebius.checkpoint import hub, reversing
from moebius.checkpoint.comparing import FLOATS
from moebius.checkpoint.converter import Rule
from moebius.checkpoint.files import CheckpointFiles
from moebius.checkpoint.loading import Progress, check_room
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.reading import dtype_name, torch_dtype
from moebius.config import DecoderConfig
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import generate
from moebius.layers.decoder import Decoder
from moebius.layers.quantized import hold
from moebius.models import Family, family_of
from moebius.models.counting import count_parameters
from moebius.quantization.forms import Form

NOTHING_HELD: Mapping[str, Form] = {}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose headers are read and whose plan is made; no weight was read.

    raw_config: config.json as it stands.  dtype: of the model that the plan fills.  held: the weights that the model
    keeps in the quantized form in which they are stored.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    family: Family
    config: DecoderConfig
    dtype: str
    files: CheckpointFiles
    plan: Plan
    held: Mapping[str, Form]
    weight_conversions: tuple[Rule, ...] = ()


class CausalLM(Decoder):
    """A Decoder that knows where it came from: it generates, and saves itself in the hub's layout.

    source: the opened checkpoint it was loaded from, None for a model made from a config.
    """

    def __init__(self, config: DecoderConfig, family: Family, *, experts_implementation: str = "auto"):
        super().__init__(config, experts_implementation=experts_implementation)
        self.family = family
        self.source: OpenedCheckpoint | None = None
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id or None,
            pad_token_id=config.pad_token_id,
        )

    @property
    def plan(self) -> Plan | None:
        """How the files filled this model; None for a model made from a config."""
        return self.source.plan if self.source else None

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def num_parameters(self) -> int:
        """Parameters, tied ones once; a quantized weight counts as what it stands for."""
        return count_parameters(self.config).total

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continues `input_ids` [B, T] (int64): the ids [B, T + new], as transformers' generate gives them.

        options: those of moebius.generation.generate (attention_mask, max_new_tokens, do_sample, streamer, ...); what
        they and `generation_config` leave open comes from the checkpoint's generation_config.json.
        Raises ArgumentError for an option that is unknown or not supported.
        """
        given = arguments.generation_config_of(generation_config).over(self.generation_config)
        return generate(self, input_ids, generation_config=given, **options)

    def save_pretrained(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", progress: Progress | None = None
    ) -> None:
        """Writes the model in the hub's own layout: per-expert tensors, config.json, generation_config.json.

        A loaded model keeps its files' names, keys and order (max_shard_size then has no say).  One whose weights were
        decoded from a quantized form is written as a plain one, without what it does not use.  Other files of the
        folder stay.  Raises SaveError if it cannot be written; the folder then holds what it held.
        """
        tensors = {names[0]: tensor.detach() for names, tensor in _named_tensors(self)}
        plan = self._save_plan(arguments.byte_count(max_shard_size))
        checkpoint.save(plan, tensors, path, extra_files=self._described(), progress=progress)
        if self.source and self.source.folder.resolve() == hub.local_path(path).resolve():
            self.source = _reopened(self.source)

    def _save_plan(self, max_shard_bytes: int) -> Plan | reversing.SavePlan:
        if self.plan and not self.plan.encoded:
            return self.plan
        if self.plan and self.plan.skipped:
            logger.warning("not written: %d tensors that the model does not use", len(self.plan.skipped))
        return reversing.from_nothing(self.family.rules(self.config), _targets(self), max_shard_bytes)

    def _described(self) -> dict[str, bytes]:
        raw = self.source.raw_config if self.source else self.family.to_hf(self.config)
        decoded = bool(self.plan and self.plan.encoded)
        folder = self.source and self.source.folder
        return model_folder.described(raw, dtype_name(self.dtype), self.generation_config, folder, decoded=decoded)


class AutoModelForCausalLM:
    """Opens any checkpoint of a known family."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        experts_implementation: str = "auto",
        weight_conversions: Sequence[Rule] = (),
        check_tensors: bool = False,
        loading: str | None = None,
        mapping: str = "auto",
        progress: Progress | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The model in a folder or of a hub id, on `device_map`, in eval mode.

        dtype: "auto" (the checkpoint's; weights that are stored quantized stay so), a torch dtype or its name
        (quantized weights are decoded while they are read).  device_map: None or "cpu", "cuda", "cuda:N", "auto" (a GPU
        if there is one), "meta" (no weights).  experts_implementation: a backend's name, or "auto".
        weight_conversions: rules that come before the family's.  check_tensors: also refuse NaN.
        loading: "async" (threads, the default) or "sync" (one, in the files' order; also HF_DEACTIVATE_ASYNC_LOAD=1).
        mapping: "auto" lets CPU weights be pages of the files where they lie there as they are needed (a change of the
        files would be a change of the weights; they are aligned as in the file, so that products may differ in their
        last bit), "never" copies them.
        output_loading_info: give (model, info), as transformers does.  options: revision, token, cache_dir,
        local_files_only, force_download; transformers' other arguments are accepted where they are true anyway and
        refused by name where they are not.
        Raises ArgumentError, ConfigError, CheckpointError, BackendError, CapacityError, before a weight is read.
        """
        download = arguments.check_options(options)
        device, how = arguments.device_of(device_map), arguments.load_options(loading, mapping)
        opened = open_checkpoint(
            name_or_path, dtype=arguments.either(dtype, options), weight_conversions=weight_conversions, **download
        )
        model = _build(opened.config, opened.family, experts_implementation, opened.held)
        model.source = opened
        model.generation_config = GenerationConfig.from_pretrained(opened.folder)
        if device.type != "meta":
            check_room(opened.plan, device)
            loaded = checkpoint.load(
                opened.plan, device=device, progress=progress, check_tensors=check_tensors, options=how
            )
            _fill(model, loaded)
        model.eval()
        return (model, _loading_info(opened.plan)) if output_loading_info else model

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig | Mapping[str, Any],
        *,
        dtype: str | torch.dtype | None = None,
        experts_implementation: str = "auto",
        generator: torch.Generator | None = None,
    ) -> CausalLM:
        """A new model, freshly initialised (normal with initializer_range, norms one, biases zero), on the CPU.

        config: a DecoderConfig, or the content of a config.json.  dtype: None or "auto" is the config's, else float32.
        Raises ConfigError.
        """
        raw = {"model_type": config.model_type} if isinstance(config, DecoderConfig) else config
        family = family_of(raw)
        decoder_config = config if isinstance(config, DecoderConfig) else family.from_hf(raw)
        name = arguments.dtype_name_of(dtype) or decoder_config.dtype or "float32"
        model = _build(replace(decoder_config, dtype=name), family, experts_implementation).to_empty(device="cpu")
        model.tie_weights()
        model.init_weights(generator)
        return model


def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    weight_conversions: Sequence[Rule] = (),
    **download: Any,
) -> OpenedCheckpoint:
    """Reads config and headers and makes the plan: everything that loading checks before it reads a weight.

    Arguments and errors as for AutoModelForCausalLM.from_pretrained.
    """
    wanted = arguments.dtype_name_of(dtype)
    folder = hub.resolve(name_or_path, **download)
    raw = model_folder.read_config(folder)
    family = family_of(raw)
    config = family.from_hf(raw)
    files = checkpoint.open_files(folder)
    config = replace(config, dtype=wanted or config.dtype or _stored_dtype(files))

    def planned(model: CausalLM, *, keep: bool) -> Plan:
        rules, form = family.rules(config), family.stored_form(raw)
        return checkpoint.plan(files, rules, _targets(model), weight_conversions, form=form, keep=keep)

    plan = planned(_build(config, family, "auto"), keep=False)
    held = {} if wanted else plan.encoded
    if held:
        plan = planned(_build(config, family, "auto", held), keep=True)
    return OpenedCheckpoint(
        folder, raw, family, config, str(config.dtype), files, plan, held, tuple(weight_conversions)
    )


def _reopened(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """The same folder after its files were written anew, for the next save."""
    return open_checkpoint(opened.folder, weight_conversions=opened.weight_conversions)


def _stored_dtype(files: CheckpointFiles) -> str:
    """The float that most of the files' bytes are in."""
    nbytes: Counter[str] = Counter()
    for info in files.tensors.values():
        nbytes[info.dtype] += info.nbytes if info.dtype in FLOATS else 0
    return max(FLOATS, key=lambda name: nbytes[name])


def _build(
    config: DecoderConfig, family: Family, experts_implementation: str, held: Mapping[str, Form] = NOTHING_HELD
) -> CausalLM:
    """The model without memory for its weights, in the config's dtype, `held` weights in their forms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(config.dtype or "float32"))
    try:
        with torch.device("meta"):
            model = CausalLM(config, family, experts_implementation=experts_implementation)
            hold(model, held)
            return model
    finally:
        torch.set_default_dtype(before)


def _named_tensors(model: CausalLM) -> list[tuple[list[str], torch.Tensor]]:
    """All that is saved of a model: each tensor once, with all its names."""
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [(group, tensors[group[0]]) for group in names.values()]


def _targets(model: CausalLM) -> list[Target]:
    """The model's tensors as the planner wants them: a tied one once, with its other names as aliases."""
    return [
        Target(name, tuple(tensor.shape), dtype_name(tensor.dtype), tuple(aliases))
        for (name, *aliases), tensor in _named_tensors(model)
    ]


def _fill(model: CausalLM, tensors: Mapping[str, torch.Tensor]) -> None:
    aliases = {alias: tensors[target.name] for target in _targets(model) for alias in target.aliases}
    model.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    model.tie_weights()


def _loading_info(plan: Plan) -> dict[str, Any]:
    """transformers' shape of it; what could fill its sets was refused before."""
    skipped = {info.name for info, _ in plan.skipped}
    return {"missing_keys": set(), "unexpected_keys": skipped, "mismatched_keys": set(), "error_msgs": []}
