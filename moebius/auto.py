"""The front door, wiring only: from a name to a model that runs, and back to files."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moebius import arguments, checkpoint, model_folder, placement
from moebius.checkpoint import hub, reversing
from moebius.checkpoint.collection import collection_paused
from moebius.checkpoint.converter import Rule
from moebius.checkpoint.device import PinnedSlots
from moebius.checkpoint.loading import Progress, check_room, free_bytes
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.publishing import publish, unmerged
from moebius.checkpoint.quantizing import Packing, quantized
from moebius.checkpoint.reading import dtype_name, torch_dtype
from moebius.config import DecoderConfig
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import generate
from moebius.layers.decoder import Decoder
from moebius.layers.quantized import hold
from moebius.layers.quantizing import forms_for, segments_of
from moebius.models import Family, family_of
from moebius.models.counting import count_parameters
from moebius.models.published_forms import write_stored_form
from moebius.opening import (
    LoadReport,
    OpenedCheckpoint,
    Stages,
    refuse_more_than_stored,
    stored_dtype,
    stored_forms,
)
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.forms import Form

NOTHING_HELD: Mapping[str, Form] = {}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """What a save writes, and from what; quantization_config: None where config.json's own holds, if there is one."""

    plan: Plan | reversing.SavePlan
    tensors: Mapping[str, torch.Tensor]
    quantization_config: Mapping[str, Any] | None = None


class CausalLM(Decoder):
    """A Decoder that knows where it came from: it generates, and saves itself in the hub's layout.

    source: the opened checkpoint it was loaded from, load_report: how that went; None for a model made from a config.
    """

    def __init__(self, config: DecoderConfig, family: Family, *, experts_implementation: str = "auto"):
        super().__init__(config, experts_implementation=experts_implementation)
        self.family = family
        self.source: OpenedCheckpoint | None = None
        self.load_report: LoadReport | None = None
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
    def hf_device_map(self) -> dict[str, int | str]:
        """The device of each part, {"": device} where all are on one; a GPU by its number.  As transformers has it."""
        return placement.hf_device_map({name: str(tensor.device) for name, tensor in self.state_dict().items()})

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
        self,
        path: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        layout: str | None = None,
        checksums: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Writes the model in the hub's own layout: per-expert tensors, config.json, generation_config.json.

        A loaded model keeps its files' names, keys and order (max_shard_size then has no say).  One whose weights were
        decoded or quantized while they were read is written anew, without what it does not use: plain, or as its form
        is published (docs/quantization.md).  layout: "published" writes any model anew in its family's layout, "packed"
        with the experts as they lie in memory.  checksums: also write SHA256SUMS, for check_tensors and for
        `sha256sum -c`.  Other files of the folder stay.
        Raises SaveError if it cannot be written; the folder then holds what it held.
        """
        todo = self._save_plan(arguments.byte_count(max_shard_size), arguments.layout_of(layout))
        checkpoint.save(
            todo.plan,
            todo.tensors,
            path,
            extra_files=self._described(todo),
            progress=progress,
            checksums=checksums,
        )
        if self.source and self.source.folder.resolve() == hub.local_path(path).resolve():
            self.source = _reopened(self.source)

    def _save_plan(self, max_shard_bytes: int, layout: str | None) -> _Save:
        tensors = {names[0]: tensor.detach() for names, tensor in _named_tensors(self)}
        if self.plan and layout is None and not (self.plan.encoded or self.plan.packs):
            return _Save(self.plan, tensors)
        if self.plan and self.plan.skipped:
            logger.warning("not written: %d tensors that the model does not use", len(self.plan.skipped))
        rules = self.family.rules(self.config)
        held = self.source.held if self.source else NOTHING_HELD
        if held:
            published = publish(rules, tensors, _packings(held), max_shard_bytes, packed=layout == "packed")
            stored = write_stored_form(published.form, published.plain_modules)
            return _Save(published.plan, published.tensors, stored)
        kept = unmerged(rules) if layout == "packed" else rules
        return _Save(reversing.from_nothing(kept, _targets(self), max_shard_bytes), tensors)

    def _described(self, todo: _Save) -> dict[str, bytes]:
        # what is written anew is described anew: the files' own words may speak of what is not there any more
        raw = self.source.raw_config if self.source and todo.plan is self.plan else self.family.to_hf(self.config)
        return model_folder.described(
            raw,
            dtype_name(self.dtype),
            self.generation_config,
            self.source and self.source.folder,
            quantization_config=todo.quantization_config,
        )


class AutoModelForCausalLM:
    """Opens any checkpoint of a known family."""

    @classmethod
    @collection_paused()
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
        quantization: str | None = None,
        quantization_config: QuantizationConfig | Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The model in a folder or of a hub id, on `device_map`, in eval mode.

        dtype: "auto" (the checkpoint's; weights that are stored quantized stay so), a torch dtype or its name
        (quantized weights are decoded while they are read).  device_map: None or "cpu", "cuda", "cuda:N", "meta" (no
        weights), a device a module ({"model": 0, "lm_head": "cpu"}, a layer being the smallest), or "auto" (one GPU if
        it can take all, else layers are spread over all GPUs and the host), "balanced", "sequential" (see
        placement.Strategy).  experts_implementation: a backend's name, or "auto".
        weight_conversions: rules that come before the family's.  check_tensors: also refuse NaN, and bytes
        that differ from the folder's SHA256SUMS or the hub's.
        loading: "async" (threads, the default) or "sync" (one, in the files' order; also HF_DEACTIVATE_ASYNC_LOAD=1).
        mapping: "auto" lets CPU weights be pages of the files where they lie there as they are needed (a change of the
        files would be a change of the weights; they are aligned as in the file, so that products may differ in their
        last bit), "never" copies them.
        quantization: "int8", "int4", "fp8" or "mxfp4" quantizes experts and linear layers while they are read;
        quantization_config says more (a QuantizationConfig or its fields).
        output_loading_info: give (model, info), as transformers does.  options: max_memory, the bytes that weights may
        take of each device ({0: "10GiB", "cpu": "30GiB"}; no other is used), revision, token, cache_dir,
        local_files_only, force_download; transformers' other arguments are accepted where they are true anyway and
        refused by name where they are not.
        Raises ArgumentError, ConfigError, CheckpointError, BackendError, CapacityError, before a weight is read.
        """
        download = arguments.check_options(options)
        wanted = arguments.device_map_of(device_map, options.get("max_memory"))
        how = arguments.load_options(loading, mapping)
        stages = Stages()
        pinned = PinnedSlots() if any(map(placement.is_gpu, wanted.devices)) else None  # while the plan is made
        opened, model = _opened(
            name_or_path,
            dtype=arguments.either(dtype, options),
            weight_conversions=weight_conversions,
            quantization=arguments.quantization_of(quantization, quantization_config),
            experts_implementation=experts_implementation,
            stages=stages,
            **download,
        )
        model.source = opened
        model.generation_config = GenerationConfig.from_pretrained(opened.folder)
        devices = placement.place(wanted, opened.plan, free_bytes)
        if "meta" not in devices.values():
            for kind in {torch.device(device).type for device in devices.values()}:
                model.experts_backend(kind)  # refused here if it cannot run, before a weight is read
            check_room(opened.plan, devices)
            with stages.timed("weights"):
                loaded = checkpoint.load(
                    opened.plan,
                    device=devices,
                    progress=progress,
                    check_tensors=check_tensors,
                    options=how,
                    pinned=pinned,
                )
            _fill(model, loaded)
        model.eval()
        model.load_report = LoadReport(opened.plan, stages.seconds)
        logger.info("loaded %s: %s", opened.folder, model.load_report.timing())
        return (model, model.load_report.as_transformers()) if output_loading_info else model

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


@collection_paused()
def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    weight_conversions: Sequence[Rule] = (),
    quantization: QuantizationConfig | None = None,
    **download: Any,
) -> OpenedCheckpoint:
    """Reads config and headers and makes the plan: everything that loading checks before it reads a weight.

    Arguments and errors as for AutoModelForCausalLM.from_pretrained.
    """
    opened, _ = _opened(
        name_or_path,
        dtype=dtype,
        weight_conversions=weight_conversions,
        quantization=quantization,
        experts_implementation="auto",
        stages=Stages(),
        **download,
    )
    return opened


def _opened(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None,
    weight_conversions: Sequence[Rule],
    quantization: QuantizationConfig | None,
    experts_implementation: str,
    stages: Stages,
    **download: Any,
) -> tuple[OpenedCheckpoint, CausalLM]:
    """As open_checkpoint; with the model, without memory for its weights."""
    wanted = arguments.dtype_name_of(dtype)
    folder = hub.resolve(name_or_path, **download)
    with stages.timed("files"):
        raw = model_folder.read_config(folder)
        family = family_of(raw)
        config = family.from_hf(raw)
        files = checkpoint.open_files(folder)
        refuse_more_than_stored(config, files)
        config = replace(config, dtype=wanted or config.dtype or stored_dtype(files))

    def planned(model: CausalLM, *, keep: bool) -> Plan:
        rules, form = family.rules(config), family.stored_form(raw)
        return checkpoint.plan(files, rules, _targets(model), weight_conversions, form=form, keep=keep)

    with stages.timed("plan"):
        model = _build(config, family, experts_implementation)
        plan = planned(model, keep=False)
        if held := forms_for(model, quantization) if quantization else {} if wanted else stored_forms(plan, model):
            model = _build(config, family, experts_implementation, held)
            plan = quantized(plan, _packings(held)) if quantization else planned(model, keep=True)
    conversions = tuple(weight_conversions)
    return OpenedCheckpoint(folder, raw, family, config, str(config.dtype), files, plan, held, conversions), model


def _reopened(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """The same folder after its files were written anew, for the next save."""
    return open_checkpoint(opened.folder, weight_conversions=opened.weight_conversions)


def _packings(held: Mapping[str, Form]) -> dict[str, Packing]:
    return {name: Packing(form, segments_of(name)) for name, form in held.items()}


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


def targets_of(config: DecoderConfig, family: Family) -> list[Target]:
    """What a plain model of this config wants filled, in the config's dtype."""
    return _targets(_build(config, family, "auto"))


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
