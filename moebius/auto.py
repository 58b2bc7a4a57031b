"""The front door, wiring only: from a name to a model that runs, and back to files."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moebius import arguments, checkpoint, on_ranks, placement
from moebius.checkpoint import hub
from moebius.checkpoint.collection import collection_paused
from moebius.checkpoint.converter import Rule
from moebius.checkpoint.device import PinnedSlots
from moebius.checkpoint.loading import Progress, check_room, free_bytes
from moebius.checkpoint.owning import owned
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.quantizing import quantized
from moebius.checkpoint.reading import torch_dtype
from moebius.config import DecoderConfig
from moebius.distributed.config import DistributedConfig
from moebius.experts.interface import Experts
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import generate
from moebius.layers.decoder import Decoder
from moebius.layers.quantized import hold
from moebius.layers.quantizing import forms_for
from moebius.model_saving import described, packings, save_of
from moebius.model_tensors import fill, named_tensors, targets
from moebius.models import Family, family_of
from moebius.models.counting import count_parameters
from moebius.opening import FoundCheckpoint, LoadReport, OpenedCheckpoint, Stages, found, stored_forms
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.forms import Form

if TYPE_CHECKING:
    from moebius.distributed.ranks import Ranks
    from moebius.distributed.spread import Spread

NOTHING_HELD: Mapping[str, Form] = {}
logger = logging.getLogger(__name__)


class CausalLM(Decoder):
    """A Decoder that knows where it came from: it generates, and saves itself in the hub's layout.

    source: the opened checkpoint it was loaded from, load_report: how that went; None for a model made from a config.
    step_header: what ranks tell each other before every forward; None for a model of this process alone.
    """

    def __init__(
        self,
        config: DecoderConfig,
        family: Family,
        *,
        experts_implementation: str = "auto",
        place: on_ranks.Place | None = None,
    ):
        experts_class = place.experts_class if place else Experts
        super().__init__(config, experts_implementation=experts_implementation, experts_class=experts_class)
        self.family = family
        self.source: OpenedCheckpoint | None = None
        self.load_report: LoadReport | None = None
        self.step_header = place.attend(self) if place else None
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id or None,
            pad_token_id=config.pad_token_id,
        )

    @property
    def ranks(self) -> "Ranks | None":
        """The ranks that the model is spread over; None for a model of this process alone."""
        return self.step_header.ranks if self.step_header else None

    @property
    def spread(self) -> "Spread | None":
        """How it is spread over them."""
        return on_ranks.spread_of(self) if self.step_header else None

    @property
    def boxes(self) -> Mapping[str, range]:
        """The rows (axis 0) that this rank holds, of each tensor that it does not hold whole."""
        return spread.boxes if (spread := self.spread) else {}

    @property
    def plan(self) -> Plan | None:
        """How the files fill the whole model, on all ranks; None for a model made from a config."""
        return self.source.plan if self.source else None

    def targets(self) -> list[Target]:
        """What a planner is to fill, of the whole model."""
        return targets(self, self.spread)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Gives every parameter and buffer its value, {name: tensor}, a tied one once; they had no memory so far."""
        fill(self, tensors, self.spread)

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
        On ranks every one calls it: with the same prompts and settings if the batch is shared, and rank 0 then chooses
        the tokens and streams them; else with its own.  ArgumentError: an option is unknown or refused.  RankError.
        """
        given, header = arguments.generation_config_of(generation_config).over(self.generation_config), self.step_header
        if header is None:
            return generate(self, input_ids, generation_config=given, **options)
        if header.batch == "shared":
            options["streamer"] = options.get("streamer") if header.ranks.first else None
        with on_ranks.generating(self, header, given, options) as agree:
            if header.batch == "distinct" and input_ids is not None and not len(input_ids):
                return input_ids  # and from here on serves the others' tokens
            return generate(self, input_ids, generation_config=given, agree=agree, **options)

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
        `sha256sum -c`.  Other files of the folder stay.  On ranks every one calls it, and writes what it holds.
        Raises SaveError if it cannot be written; the folder then holds what it held.
        """
        todo = save_of(self, arguments.byte_count(max_shard_size), arguments.layout_of(layout))
        ranks = self.ranks
        checkpoint.save(
            todo.plan,
            todo.tensors,
            path,
            extra_files=described(self, todo),
            progress=progress,
            checksums=checksums,
            team=ranks,
            boxes=todo.boxes,
        )
        if self.source and self.source.folder.resolve() == hub.local_path(path).resolve():
            self.source = _reopened(self.source)


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
        distributed_config: DistributedConfig | Mapping[str, Any] | None = None,
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
        distributed_config: a DistributedConfig, its fields, or transformers' object: experts are spread over the ranks
        that torchrun started (without it, this process is the only one), each reads and holds its own; device_map then
        says "cpu", "cuda" or nothing.  Every rank calls this; an error on one is raised on all.
        output_loading_info: give (model, info), as transformers does.  options: max_memory, the bytes that weights may
        take of each device ({0: "10GiB", "cpu": "30GiB"}; no other is used), revision, token, cache_dir,
        local_files_only, force_download; transformers' other arguments are accepted where they are true anyway and
        refused by name where they are not.
        Raises ArgumentError, ConfigError, CheckpointError, BackendError, CapacityError, before a weight is read;
        RankError.
        """
        download, asked = arguments.check_options(options), arguments.distributed_config_of(distributed_config)
        how, stages = arguments.load_options(loading, mapping), Stages()
        name = arguments.dtype_name_of(arguments.either(dtype, options))
        packed = arguments.quantization_of(quantization, quantization_config)
        ranks = on_ranks.entered(asked, device_map, options.get("max_memory"))
        on_ranks.check_same_arguments(ranks, dtype=name, quantization=packed, backend=experts_implementation)
        wanted = on_ranks.devices(ranks, device_map, options.get("max_memory"))
        pinned = PinnedSlots() if any(map(placement.is_gpu, wanted.devices)) else None  # while the plan is made
        with on_ranks.together(ranks, f"opening {name_or_path}"):
            folder = on_ranks.located(name_or_path, ranks, **download)
            with stages.timed("files"):
                here = found(folder, name)
        place = on_ranks.arranged(ranks, asked, here.config)
        with on_ranks.together(ranks, f"planning {folder}"):
            opened, model = _planned(
                here,
                weight_conversions=weight_conversions,
                quantization=packed,
                decoded=name is not None,
                experts_implementation=experts_implementation,
                place=place,
                stages=stages,
            )
        on_ranks.shard(model, place)  # makes groups: on all ranks, once all have a plan
        with on_ranks.together(ranks, f"loading {folder}"):
            model.source = opened
            model.generation_config = GenerationConfig.from_pretrained(folder)
            plan = owned(opened.plan, model.boxes) if place else opened.plan
            devices = placement.place(wanted, plan, free_bytes)
            if "meta" not in devices.values():
                for kind in {torch.device(device).type for device in devices.values()}:
                    model.experts_backend(kind)  # refused here if it cannot run, before a weight is read
                check_room(plan, devices)
                with stages.timed("weights"):
                    loaded = checkpoint.load(
                        plan,
                        device=devices,
                        progress=progress,
                        check_tensors=check_tensors,
                        options=how,
                        pinned=pinned,
                    )
                model.fill(loaded)
        on_ranks.check_same_weights(model, place)
        model.eval()
        model.load_report = LoadReport(plan, stages.seconds)
        logger.info("loaded %s: %s", folder, model.load_report.timing())
        return (model, model.load_report.as_transformers()) if output_loading_info else model

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig | Mapping[str, Any],
        *,
        dtype: str | torch.dtype | None = None,
        experts_implementation: str = "auto",
        distributed_config: DistributedConfig | Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> CausalLM:
        """A new model, freshly initialised (normal with initializer_range, norms one, biases zero), on the CPU.

        config: a DecoderConfig, or the content of a config.json.  dtype: None or "auto" is the config's, else float32.
        distributed_config: as from_pretrained takes it; each rank is then on its own device, and has of the model that
        one process would make (which it makes, and drops) its experts and all the rest.
        Raises ConfigError, ArgumentError, RankError.
        """
        raw = {"model_type": config.model_type} if isinstance(config, DecoderConfig) else config
        family = family_of(raw)
        decoder_config = config if isinstance(config, DecoderConfig) else family.from_hf(raw)
        name = arguments.dtype_name_of(dtype) or decoder_config.dtype or "float32"
        decoder_config = replace(decoder_config, dtype=name)
        asked = arguments.distributed_config_of(distributed_config)
        ranks = on_ranks.entered(asked)
        place = on_ranks.arranged(ranks, asked, decoder_config)
        model = _build(decoder_config, family, experts_implementation).to_empty(device="cpu")
        model.tie_weights()
        model.init_weights(on_ranks.same_noise(ranks, generator))
        return _spread(model, place, experts_implementation) if place else model


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
    name = arguments.dtype_name_of(dtype)
    opened, _ = _planned(
        found(hub.resolve(name_or_path, **download), name),
        weight_conversions=weight_conversions,
        quantization=quantization,
        decoded=name is not None,
        experts_implementation="auto",
        place=None,
        stages=Stages(),
    )
    return opened


def _planned(
    here: FoundCheckpoint,
    *,
    weight_conversions: Sequence[Rule],
    quantization: QuantizationConfig | None,
    decoded: bool,
    experts_implementation: str,
    place: on_ranks.Place | None,
    stages: Stages,
) -> tuple[OpenedCheckpoint, CausalLM]:
    """As open_checkpoint; with the model, without memory for its weights.  decoded: no weight stays quantized."""
    config, family = here.config, here.family
    conversions = tuple(weight_conversions)
    make = partial(_build, config, family, experts_implementation, place)

    def planned(model: CausalLM, *, keep: bool) -> Plan:
        rules, form = family.rules(config), family.stored_form(here.raw_config)
        return checkpoint.plan(here.files, rules, model.targets(), conversions, form=form, keep=keep)

    with stages.timed("plan"):
        model = make()
        plan = planned(model, keep=False)
        if held := forms_for(model, quantization) if quantization else {} if decoded else stored_forms(plan, model):
            model = make(held)
            plan = quantized(plan, packings(held)) if quantization else planned(model, keep=True)
    opened = OpenedCheckpoint(
        **vars(here), dtype=str(config.dtype), plan=plan, held=held, weight_conversions=conversions
    )
    return opened, model


def _reopened(opened: OpenedCheckpoint) -> OpenedCheckpoint:
    """The same folder after its files were written anew, for the next save."""
    return open_checkpoint(opened.folder, weight_conversions=opened.weight_conversions)


def _build(
    config: DecoderConfig,
    family: Family,
    experts_implementation: str,
    place: on_ranks.Place | None = None,
    held: Mapping[str, Form] = NOTHING_HELD,
) -> CausalLM:
    """The model without memory for its weights, in the config's dtype, `held` weights in their forms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(config.dtype or "float32"))
    try:
        with torch.device("meta"):
            model = CausalLM(config, family, experts_implementation=experts_implementation, place=place)
            hold(model, held)
            return model
    finally:
        torch.set_default_dtype(before)


def _spread(whole: CausalLM, place: on_ranks.Place, experts_implementation: str) -> CausalLM:
    """What this rank has of a model that every rank has whole."""
    model = _build(whole.config, whole.family, experts_implementation, place)
    on_ranks.shard(model, place)
    boxes = model.boxes
    tensors = {names[0]: each.detach() for names, each in named_tensors(whole)}
    mine = {
        name: each[boxes[name].start : boxes[name].stop] if name in boxes else each for name, each in tensors.items()
    }
    model.fill({name: each.to(place.ranks.device, copy=True) for name, each in mine.items()})
    return model


def targets_of(config: DecoderConfig, family: Family) -> list[Target]:
    """What a plain model of this config wants filled, in the config's dtype."""
    return _build(config, family, "auto").targets()
