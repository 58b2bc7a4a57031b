"""What a save of a model writes, and from what: as it was loaded, in its family's layout, or packed."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moebius import model_folder
from moebius.checkpoint import reversing
from moebius.checkpoint.owning import WHOLE
from moebius.checkpoint.planning import Plan
from moebius.checkpoint.publishing import AS_HELD, publish, unmerged
from moebius.checkpoint.quantizing import Packing
from moebius.checkpoint.reading import dtype_name
from moebius.layers.quantizing import segments_of
from moebius.model_tensors import local
from moebius.models.published_forms import write_stored_form
from moebius.quantization.forms import Form

if TYPE_CHECKING:
    from moebius.auto import CausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Save:
    """plan: of the whole model.  tensors: what this process has of it, of those in `boxes` only so much of axis 0.

    quantization_config: None where config.json's own holds, if there is one.
    """

    plan: Plan | reversing.SavePlan
    tensors: Mapping[str, torch.Tensor]
    boxes: Mapping[str, range]
    quantization_config: Mapping[str, Any] | None = None


def save_of(model: "CausalLM", max_shard_bytes: int, layout: str | None) -> Save:
    """layout: None, "published" or "packed".  SaveError: a quantized form has no published layout in the family."""
    spread = model.spread
    tensors, boxes = local(model, spread), spread.boxes if spread else WHOLE
    if model.plan and layout is None and not (model.plan.encoded or model.plan.packs):
        return Save(model.plan, tensors, boxes)
    if model.plan and model.plan.skipped:
        logger.warning("not written: %d tensors that the model does not use", len(model.plan.skipped))
    rules = model.family.rules(model.config)
    if model.source and model.source.held:
        held, shapes = packings(model.source.held), spread.shapes if spread else AS_HELD
        packed = layout == "packed"
        published = publish(rules, tensors, held, max_shard_bytes, packed=packed, shapes=shapes, boxes=boxes)
        stored = write_stored_form(published.form, published.plain_modules)
        return Save(published.plan, published.tensors, published.boxes, stored)
    kept = unmerged(rules) if layout == "packed" else rules
    return Save(reversing.from_nothing(kept, model.targets(), max_shard_bytes), tensors, boxes)


def described(model: "CausalLM", save: Save) -> dict[str, bytes]:
    """The small files beside the weights."""
    # what is written anew is described anew: the files' own words may speak of what is not there any more
    raw = model.source.raw_config if model.source and save.plan is model.plan else model.family.to_hf(model.config)
    return model_folder.described(
        raw,
        dtype_name(model.dtype),
        model.generation_config,
        model.source and model.source.folder,
        quantization_config=save.quantization_config,
    )


def packings(held: Mapping[str, Form]) -> dict[str, Packing]:
    """How each of the held weights, by its name, is laid out."""
    return {name: Packing(form, segments_of(name)) for name, form in held.items()}
