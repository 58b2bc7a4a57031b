"""BlockFp8: 8-bit floats in blocks of rows and columns that share a scale.  R block rows.

See `forms.BlockFp8` for the layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.quantization.forms import BlockFp8

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def unpack(form: BlockFp8, values: Tensor, scales: Tensor, dtype: torch.dtype, segments: int = 1) -> Tensor:
    """values e4m3 [..., out, in], scales [..., R * segments, ceil(in / columns)] -> [..., out, in]."""
    weight = values.float()
    for part, part_scales in zip(weight.chunk(segments, -2), scales.chunk(segments, -2), strict=True):
        for block, scale in _blocks(form, part, part_scales):
            block.mul_(scale)
    return weight.to(dtype)


def pack(form: BlockFp8, weight: Tensor, segments: int = 1) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> values e4m3 [..., out, in], scales [..., R * segments, ceil(in / columns)].

    The scale takes a block's largest to 448, e4m3's largest, or, where it is a power of two, no further than that;
    a block of zeros has scale 1.  What is not finite becomes NaN.
    """
    wide = weight.to(torch.float32, copy=True)
    parts = wide.chunk(segments, -2)
    scales = torch.cat([_scales(form, part) for part in parts], dim=-2)
    for part, part_scales in zip(parts, scales.chunk(segments, -2), strict=True):
        for block, scale in _blocks(form, part, part_scales):
            block.div_(scale)
    # e4m3 has no infinity, and what a cast makes of one differs between versions of torch
    return wide.masked_fill_(wide.isinf(), torch.nan).to(torch.float8_e4m3fn), scales


def _blocks(form: BlockFp8, part: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of one segment [..., out, in] beside scales of their width: all whole block rows at once, then the rest."""
    rows, columns = form.block
    whole = part.shape[-2] // rows
    width = part.shape[-1]  # a block may be stated wider than any matrix
    wide = scales.float().repeat_interleave(min(columns, width), dim=-1)[..., :width]
    return [
        (part[..., : whole * rows, :].unflatten(-2, (whole, rows)), wide[..., :whole, :].unsqueeze(-2)),
        (part[..., whole * rows :, :], wide[..., whole:, :]),
    ]


def _scales(form: BlockFp8, part: Tensor) -> Tensor:
    """One segment [..., out, in] -> its scales [..., R, ceil(in / columns)]."""
    (rows, columns), (height, width) = form.block, part.shape[-2:]
    finite = part.abs().nan_to_num(0, posinf=0)
    padded = F.pad(finite, (0, -width % columns, 0, -height % rows))
    largest = padded.unflatten(-1, (-1, columns)).amax(dim=-1).unflatten(-2, (-1, rows)).amax(dim=-2)
    # a scale below the smallest normal number has too few bits to divide by
    # by a tensor, because a card divides by a number by multiplying with its inverse, to another last bit
    scales = (largest / largest.new_full((), LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)
    scales = scales.where(largest > 0, 1.0)
    return _power_of_two_above(scales) if form.scale_dtype == "float8_e8m0fnu" else scales


def _power_of_two_above(scales: Tensor) -> Tensor:
    """The next power of two that is not smaller, e8m0."""
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int()).to(torch.float8_e8m0fnu)
