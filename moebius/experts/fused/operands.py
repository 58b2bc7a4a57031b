"""What the launches of all products take besides tensors: boxes for the copy engine, blocks, numbers of activations."""

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moebius.config import Activation, ClampedSwiGLU, SwiGLU
from moebius.experts.fused.routing import Routing
from moebius.experts.fused.tuning import TileConfig

TMA_ALIGNMENT = 16  # bytes, of the base and of every stride but the last
INTERPRETED_PROCESSORS = 3
OVERLAPPED_ROWS = 64
"""Up to so many rows an expert the kernels of a chain overlap.  On an H200 that saves 1-2 % of a layer at 0.5, 4 and 32
rows an expert, and costs 8-10 % at 256 and 1024: programs that stand ready take the room of those that work.
"""


def boxes(tensor: Tensor, block: list[int]) -> TensorDescriptor | Tensor:
    """What the kernel reads `block` at a time: a descriptor, where the copy engine can; else the tensor itself."""
    strides = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    aligned = all(number % TMA_ALIGNMENT == 0 for number in (tensor.data_ptr(), *strides))
    return TensorDescriptor.from_tensor(tensor, block) if aligned and _has_tma(tensor.device) else tensor


def blocks(config: TileConfig) -> dict[str, int]:
    """The sizes of a tile, and the options of its launch."""
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return {**sizes, "GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages}


def programs(config: TileConfig, device: torch.device, items: int) -> int:
    """How many programs share the work items."""
    return items if config.schedule == "tile" else min(items, config.programs * _processors(device))


def overlapping(device: torch.device, routing: Routing) -> dict[str, bool]:
    """Programmatic dependent launch of a chain of kernels, where it is faster."""
    few = routing.rows_per_expert <= OVERLAPPED_ROWS
    return {"OVERLAP": True, "launch_pdl": True} if few and can_overlap(device) else {"OVERLAP": False}


def can_overlap(device: torch.device) -> bool:
    """Programmatic dependent launch came with compute capability 9.0; the interpreter does not play it."""
    return device.type == "cuda" and _has_tma(device)


def activation_kind(activation: Activation) -> int:
    """The number of an activation in the kernels."""
    match activation:
        case SwiGLU():
            return 0
        case ClampedSwiGLU():
            return 1


def activation_numbers(activation: Activation) -> tuple[float, float]:
    """alpha and limit; an activation without them gets numbers that nothing reads."""
    match activation:
        case SwiGLU():
            return 1.0, 0.0
        case ClampedSwiGLU(alpha, limit):
            return alpha, limit


@functools.cache
def _has_tma(device: torch.device) -> bool:
    """The copy engine came with compute capability 9.0; the interpreter plays one too."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
