"""Int8: symmetric 8-bit integers in rows that share a scale.

See `forms.Int8` for the layout.
"""

import torch
from torch import Tensor

from moebius.quantization.forms import Int8
from moebius.quantization.rounding import nearest_

LOWEST, HIGHEST = -128, 127


def unpack(form: Int8, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values int8 [..., out, in], scales [..., out, 1] -> [..., out, in]."""
    return values.float().mul_(scales.float()).to(dtype)


def pack(form: Int8, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> values int8 [..., out, in], scales [..., out, 1] in the form's dtype.

    The scale is the smallest, up to its dtype's rounding, that takes a row's largest to 127 at most and its lowest to
    -128 at least; a row of zeros has scale 1, and one that is not finite a scale that is not.
    """
    rows = weight.to(torch.float32, copy=True)
    # by tensors, because a card divides by a number by multiplying with its inverse, to another last bit
    highest, lowest = rows.new_full((), HIGHEST), rows.new_full((), LOWEST)
    spread = torch.maximum(rows.amax(dim=-1, keepdim=True) / highest, rows.amin(dim=-1, keepdim=True) / lowest)
    scales = spread.where(spread != 0, 1.0).to(getattr(torch, form.scale_dtype))
    quantized = nearest_(rows.div_(scales.float())).clamp_(LOWEST, HIGHEST).nan_to_num_(0)
    return quantized.to(torch.int8), scales
