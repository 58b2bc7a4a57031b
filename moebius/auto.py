"""The front door, wiring only: from a name to a model that runs, and back to files."""

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
from moebius.checkpoint.loading import Progress, check_room, dtype_name, torch_dtype
from moebius.checkpoint.planning import Plan, Target
from moebius.config import DecoderConfig
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import generate
from moebius.layers.decoder import Decoder
from moebius.models import Family, family_of


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose headers are read and whose plan is made; no weight was read.

    raw_config: config.json as it stands.  dtype: of the model that the plan fills.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    family: Family
    config: DecoderConfig
    dtype: str
    files: CheckpointFiles
    plan: Plan
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
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

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

        A loaded model keeps its files' names, keys and order (max_shard_size then has no say).  Other files of the
        folder stay.  Raises SaveError if it cannot be written; the folder then holds what it held.
        """
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        plan = self.plan or reversing.from_nothing(
            self.family.rules(self.config), _targets(self), arguments.byte_count(max_shard_size)
        )
        checkpoint.save(plan, tensors, path, extra_files=self._described(), progress=progress)
        if self.source and self.source.folder.resolve() == hub.local_path(path).resolve():
            self.source = _reopened(self.source, self.dtype)

    def _described(self) -> dict[str, bytes]:
        raw = self.source.raw_config if self.source else self.family.to_hf(self.config)
        return model_folder.described(
            raw, dtype_name(self.dtype), self.generation_config, self.source and self.source.folder
        )


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
        progress: Progress | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The model in a folder or of a hub id, on `device_map`, in eval mode.

        dtype: "auto" (the checkpoint's), a torch dtype or its name.  device_map: None or "cpu", "cuda", "cuda:N",
        "auto" (a GPU if there is one), "meta" (no weights).  experts_implementation: a backend's name, or "auto".
        weight_conversions: rules that come before the family's.  check_tensors: also refuse NaN.
        output_loading_info: give (model, info), as transformers does.  options: revision, token, cache_dir,
        local_files_only, force_download; transformers' other arguments are accepted where they are true anyway and
        refused by name where they are not.
        Raises ArgumentError, ConfigError, CheckpointError, BackendError, CapacityError, before a weight is read.
        """
        download = arguments.check_options(options)
        device = arguments.device_of(device_map)
        opened = open_checkpoint(
            name_or_path, dtype=arguments.either(dtype, options), weight_conversions=weight_conversions, **download
        )
        model = _build(opened.config, opened.family, experts_implementation)
        model.source = opened
        model.generation_config = GenerationConfig.from_pretrained(opened.folder)
        if device.type != "meta":
            check_room(opened.plan, device)
            _fill(model, checkpoint.load(opened.plan, device=device, progress=progress, check_tensors=check_tensors))
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
    targets = _targets(_build(config, family, "auto"))
    plan = checkpoint.plan(files, family.rules(config), targets, overrides=weight_conversions)
    return OpenedCheckpoint(folder, raw, family, config, str(config.dtype), files, plan, tuple(weight_conversions))


def _reopened(opened: OpenedCheckpoint, dtype: torch.dtype) -> OpenedCheckpoint:
    """The same folder after its files were written anew, for the next save."""
    return open_checkpoint(opened.folder, dtype=dtype, weight_conversions=opened.weight_conversions)


def _stored_dtype(files: CheckpointFiles) -> str:
    """The float that most of the files' bytes are in."""
    nbytes: Counter[str] = Counter()
    for info in files.tensors.values():
        nbytes[info.dtype] += info.nbytes if info.dtype in FLOATS else 0
    return max(FLOATS, key=lambda name: nbytes[name])


def _build(config: DecoderConfig, family: Family, experts_implementation: str) -> CausalLM:
    """The model without memory for its weights, in the config's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(config.dtype or "float32"))
    try:
        with torch.device("meta"):
            return CausalLM(config, family, experts_implementation=experts_implementation)
    finally:
        torch.set_default_dtype(before)


def _targets(model: CausalLM) -> list[Target]:
    """The model's tensors as the planner wants them: a tied one once, with its other names as aliases."""
    names: dict[int, list[str]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [
        Target(first, tuple(tensors[first].shape), dtype_name(tensors[first].dtype), tuple(others))
        for first, *others in names.values()
    ]


def _fill(model: CausalLM, tensors: Mapping[str, torch.Tensor]) -> None:
    aliases = {alias: tensors[target.name] for target in _targets(model) for alias in target.aliases}
    model.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    model.tie_weights()


def _loading_info(plan: Plan) -> dict[str, Any]:
    """transformers' shape of it; what could fill its sets was refused before."""
    skipped = {info.name for info, _ in plan.skipped}
    return {"missing_keys": set(), "unexpected_keys": skipped, "mismatched_keys": set(), "error_msgs": []}
