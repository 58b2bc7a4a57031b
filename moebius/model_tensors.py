"""A model's tensors by their names: what it wants filled, and filling it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moebius.checkpoint.planning import Target
from moebius.checkpoint.reading import dtype_name
from moebius.layers.decoder import Decoder

if TYPE_CHECKING:
    from moebius.distributed.spread import Spread


def named_tensors(model: Decoder) -> list[tuple[list[str], torch.Tensor]]:
    """All that is saved of a model: each tensor once, with all its names."""
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [(group, tensors[group[0]]) for group in names.values()]


def targets(model: Decoder, spread: "Spread | None") -> list[Target]:
    """The model's tensors as the planner wants them: a tied one once, with its other names as aliases.

    Of a model that is spread over ranks, each has the shape that it has in one process.
    """
    found = [
        Target(name, tuple(tensor.shape), dtype_name(tensor.dtype), tuple(aliases))
        for (name, *aliases), tensor in named_tensors(model)
    ]
    return [replace(target, shape=spread.shapes[target.name]) for target in found] if spread else found


def fill(model: Decoder, tensors: Mapping[str, torch.Tensor], spread: "Spread | None") -> None:
    """Gives the model its weights, {name: tensor}, a tied one under its first name; its own were without memory."""
    if spread and spread.ranks.grid.fsdp > 1:
        from moebius.distributed import sharding

        sharding.fill(model, tensors)
    else:
        aliases = {alias: tensors[name] for (name, *others), _ in named_tensors(model) for alias in others}
        model.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    model.tie_weights()


def local(model: Decoder, spread: "Spread | None") -> dict[str, torch.Tensor]:
    """What this process has of the model, without gradients: each tensor under its first name."""
    found = {names[0]: tensor.detach() for names, tensor in named_tensors(model)}
    return {name: spread.local(tensor) for name, tensor in found.items()} if spread else found
