"""Which backend runs: what "auto" means, and why a named one cannot serve.  Pure functions of a Situation.

The order of preference is measured (benchmarks/README.md, "Experts"): on CUDA the fused kernels are ahead of grouped_mm
at every number of tokens, forward and backward.  On a CPU the packed products of "cpu" are ahead without a gradient,
but hold plain weights twice, so "auto" takes them for quantized ones alone, which eager would decode at every call.

H hidden, I intermediate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moebius.experts.cpu import cpu_obstacles
from moebius.experts.fused.obstacles import fused_obstacles

GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes: F.grouped_mm refuses other row strides on CUDA


@dataclass(frozen=True)
class Situation:
    """What a choice depends on.

    dtype: of the weights, decoded.  forms: names of the quantized forms that weights are held in.  capability: of the
    CUDA device, as (9, 0).  needs_grad: a backward will follow.
    """

    device_type: str
    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    forms: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    needs_grad: bool = False


class Choice(NamedTuple):
    name: str
    reason: str


def select_backend(situation: Situation) -> Choice:
    """What "auto" runs here: the first that can."""
    refused = []
    for name in _preferred(situation):
        obstacles = backend_obstacles(name, situation)
        if not obstacles:
            where = f"the first choice that runs on {situation.device_type} in {_held_as(situation)}"
            return Choice(name, "; ".join([where, *refused]))
        refused.append(f"{name} cannot run: {', '.join(obstacles)}")
    return Choice("eager", "; ".join(["it runs everywhere", *refused]))


def _preferred(situation: Situation) -> tuple[str, ...]:
    match situation.device_type:
        case "cuda":
            return ("fused", "grouped_mm")
        case "cpu":
            return ("cpu",) if situation.forms else ("grouped_mm",)
        case _:
            return ("grouped_mm",)


def _held_as(situation: Situation) -> str:
    return " + ".join(situation.forms) or str(situation.dtype).removeprefix("torch.")


def backend_obstacles(name: str, situation: Situation) -> list[str]:
    """Every reason why the backend of this name cannot run here; none for a user's backend, which judges itself."""
    match name:
        case "fused":
            return fused_obstacles(situation.device_type, situation.capability, situation.dtype, situation.forms)
        case "cpu":
            return cpu_obstacles(situation.device_type, situation.dtype, situation.needs_grad)
        case "grouped_mm":
            return [*_form_obstacles(situation), *_grouped_mm_obstacles(situation)]
        case "batched_mm":
            return _form_obstacles(situation)
        case _:
            return []


def _form_obstacles(situation: Situation) -> list[str]:
    return [f"weights held as {form} (it takes plain ones)" for form in situation.forms]


def _grouped_mm_obstacles(situation: Situation) -> list[str]:
    match situation.device_type:
        case "cpu":
            return []
        case "cuda":
            return [*_dtype_obstacles(situation), *_alignment_obstacles(situation)]
        case other:
            return [f"device {other} (it runs on cpu and cuda)"]


def _dtype_obstacles(situation: Situation) -> list[str]:
    if situation.dtype in GROUPED_MM_DTYPES:
        return []
    return [f"dtype {situation.dtype} (it takes {', '.join(map(str, GROUPED_MM_DTYPES))})"]


def _alignment_obstacles(situation: Situation) -> list[str]:
    sizes = {"hidden_size": situation.hidden_size, "intermediate_size": situation.intermediate_size}
    return [
        f"{field} {size}: rows of {size * situation.dtype.itemsize} bytes (it takes multiples of {ALIGNMENT})"
        for field, size in sizes.items()
        if size * situation.dtype.itemsize % ALIGNMENT
    ]
