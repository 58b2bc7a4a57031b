"""PackedInt4: symmetric 4-bit integers in groups that share a scale.

See `forms.PackedInt4` for the layout.
"""

import torch
from torch import Tensor

from moebius.quantization import nibbles
from moebius.quantization.forms import PackedInt4
from moebius.quantization.rounding import nearest_

LOWEST, HIGHEST = -8, 7


def unpack(form: PackedInt4, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values int32 [..., in/8], scales [..., in/group_size] -> [..., in]."""
    packed = values.contiguous().view(torch.uint8)  # the lowest nibble of an int32 lies in its first byte
    weight = nibbles.decode(packed, range(LOWEST, HIGHEST + 1)).unflatten(-1, (-1, form.group_size))
    weight *= scales.float().unsqueeze(-1)
    return weight.flatten(-2).to(dtype)


def pack(form: PackedInt4, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., in] -> values int32 [..., in/8], scales [..., in/group_size] in the form's dtype.

    The scale is the smallest, up to its dtype's rounding, that takes a group's largest to 7 at most and its lowest to
    -8 at least; a group of zeros has scale 1, and one that is not finite a scale that is not.
    """
    groups = weight.float().unflatten(-1, (-1, form.group_size))
    # by tensors, because a card divides by a number by multiplying with its inverse, to another last bit
    highest, lowest = groups.new_full((), HIGHEST), groups.new_full((), LOWEST)
    spread = torch.maximum(groups.amax(dim=-1) / highest, groups.amin(dim=-1) / lowest)
    scales = spread.where(spread != 0, 1.0).to(getattr(torch, form.scale_dtype))
    quantized = nearest_(groups / scales.float().unsqueeze(-1)).clamp_(LOWEST, HIGHEST).nan_to_num_(0)
    return nibbles.join((quantized - LOWEST).to(torch.uint8).flatten(-2)).view(torch.int32), scales
