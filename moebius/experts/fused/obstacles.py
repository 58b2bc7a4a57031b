"""Why the fused kernels cannot run somewhere.  Imports no triton, which may be what is missing."""

import importlib.util
from collections.abc import Sequence

import torch

FUSED_DTYPES = (torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)


def fused_obstacles(
    device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype, forms: Sequence[str] = ()
) -> list[str]:
    """Every reason; none if they can run.

    capability: of the CUDA device, as (9, 0); None where there is none.  dtype: that the layer computes in.  forms:
    names of the quantized forms that weights are held in; the kernels take them all.
    """
    return [*_device_obstacles(device_type, capability), *_dtype_obstacles(dtype), *_triton_obstacles()]


def _device_obstacles(device_type: str, capability: tuple[int, int] | None) -> list[str]:
    if device_type != "cuda" or capability is None:
        return [f"device {device_type} (it runs on cuda)"]
    if capability < MINIMUM_CAPABILITY:
        return [f"compute capability {capability[0]}.{capability[1]} (it takes 8.0 and later)"]
    return []


def _dtype_obstacles(dtype: torch.dtype) -> list[str]:
    return [] if dtype in FUSED_DTYPES else [f"dtype {dtype} (it takes {', '.join(map(str, FUSED_DTYPES))})"]


def _triton_obstacles() -> list[str]:
    return [] if importlib.util.find_spec("triton") else ["triton is not installed (pip install triton)"]
