"""torch's own CPU operators for few rows, and whether they work here.  They are private, so they are tried on numbers.

M rows; a weight is [out, in].
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16  # the weight's `out` in multiples of this
INNER_TILES = 2  # asked for by the packing of 4-bit weights, and unused on a CPU


def pack_linear(weight: Tensor) -> Tensor:
    """[out, in] -> the same in oneDNN's blocked layout, opaque."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """rows [M, in], what `pack_linear` gave, bias [out] -> [M, out], all of one dtype.  No gradient."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def int8_product(rows: Tensor, values: Tensor) -> Tensor:
    """rows bfloat16 [M, in] times integers int8 [out, in], transposed: bfloat16 [M, out]."""
    return torch.ops.aten._weight_int8pack_mm(rows, values, rows.new_ones(len(values)))


def pack_int4(codes: Tensor) -> Tensor:
    """codes 0..15, int32 [out, in] -> the same in 4 bits each, opaque."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)


def int4_product(rows: Tensor, packed: Tensor, group_size: int, scales: Tensor) -> Tensor:
    """rows bfloat16 [M, in] times (code - 8) * scale, transposed: bfloat16 [M, out].

    packed: from `pack_int4`.  scales: bfloat16 [in / group_size, out, 2], scale and zero point of each group.
    """
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales)


@functools.cache
def packed_linear_obstacle(dtype: torch.dtype) -> str:
    """Why `packed_linear` cannot be used on this machine; empty if it can."""
    weight = _numbers(48, 64).to(dtype)
    return _obstacle(lambda rows: packed_linear(rows.to(dtype), pack_linear(weight), None), weight)


@functools.cache
def int8_works() -> bool:
    values = (_numbers(48, 64) * 100).to(torch.int8)
    return not _obstacle(lambda rows: int8_product(rows.bfloat16(), values), values)


@functools.cache
def int4_works() -> bool:
    codes = (_numbers(48, 64) * 8).int().clamp(-8, 7)
    scales = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(2, 48, 2).contiguous()
    return not _obstacle(lambda rows: int4_product(rows.bfloat16(), pack_int4(codes + 8), 32, scales), codes)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in this dtype; without, they cost more than those in float32."""
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        case _:
            return False


def _obstacle(product: Callable[[Tensor], Tensor], weight: Tensor) -> str:
    rows = _numbers(3, weight.shape[1]).bfloat16().float()
    try:
        found = product(rows).float()
    except (RuntimeError, AttributeError) as error:  # an operator that is absent, or refuses this CPU
        return str(error).splitlines()[0]
    expected = F.linear(rows, weight.float())
    return "" if torch.allclose(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item()) else "wrong result"


def _numbers(*shape: int) -> Tensor:
    """Fixed numbers between -1 and 1; no random ones, so that the user's generator is left alone."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul(0.7).sin().view(shape)
