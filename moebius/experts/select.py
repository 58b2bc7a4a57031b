"""Which backend runs: what "auto" means, and why a named one cannot serve.  Pure functions of a Situation.

H hidden, I intermediate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes: F.grouped_mm refuses other row strides on CUDA


@dataclass(frozen=True)
class Situation:
    """What a choice depends on.

    dtype: of the weights, decoded.  forms: names of the quantized forms that weights are held in.
    """

    device_type: str
    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    forms: tuple[str, ...] = ()


class Choice(NamedTuple):
    name: str
    reason: str


def select_backend(situation: Situation) -> Choice:
    """What "auto" runs here."""
    obstacles = backend_obstacles("grouped_mm", situation)
    if obstacles:
        return Choice("eager", "grouped_mm cannot run: " + "; ".join(obstacles))
    return Choice("grouped_mm", f"it runs on {situation.device_type} in {situation.dtype}")


def backend_obstacles(name: str, situation: Situation) -> list[str]:
    """Every reason why the backend of this name cannot run here; none for a user's backend, which judges itself."""
    match name:
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
