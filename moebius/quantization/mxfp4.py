"""Mxfp4: 4-bit floats in blocks that share a power of two.

See `forms.Mxfp4` for the layout.  Source: OCP Microscaling Formats (MX) v1.0.
"""

import torch
from torch import Tensor

from moebius.quantization import nibbles
from moebius.quantization.forms import Mxfp4
from moebius.quantization.rounding import nearest_

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, section 5.3.3
E2M1 = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
LARGEST_EXPONENT = 2  # of e2m1: 4 = 2^2
EXPONENT_BIAS, NAN_SCALE = 127, 255  # of e8m0, section 5.4.1
EXPONENT_BITS, ONE, FOUR, MANTISSA_WIDTH = 0x7F800000, 0x3F800000, 0x40800000, 23  # of float32


def unpack(form: Mxfp4, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values uint8 [..., in/32, 16], scales uint8 [..., in/32] -> [..., in].  A block of scale 255 is NaN."""
    weight = nibbles.decode(values, E2M1)
    weight *= scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    return weight.flatten(-2).to(dtype)


def pack(form: Mxfp4, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., in] -> values uint8 [..., in/32, 16], scales uint8 [..., in/32], as section 6.3 has it.

    The largest of a block may be 1.5 times what its scale reaches: it saturates.  A block that is not finite
    becomes NaN.
    """
    blocks = weight.float().unflatten(-1, (-1, form.block))
    scales = _shared_scales(blocks.abs().amax(dim=-1))
    ratio = blocks / scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    codes = _magnitude_codes(ratio.abs()) | torch.signbit(ratio).to(torch.uint8) << 3
    return nibbles.join(codes), scales


def _shared_scales(largest: Tensor) -> Tensor:
    """The exponent of each block's largest, less that of the largest e2m1, as e8m0 bytes."""
    exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    scales = (exponents + EXPONENT_BIAS).clamp(min=0).where(largest > 0, 0)
    return scales.where(largest.isfinite(), NAN_SCALE).to(torch.uint8)


def _magnitude_codes(magnitudes: Tensor) -> Tensor:
    """To the nearest e2m1, ties to the even code: its steps are 0.5 below 2, 1 below 4, then 2."""
    powers = (magnitudes.view(torch.int32) & EXPONENT_BITS).clamp_(ONE, FOUR)  # 1, 2 or 4: two steps
    codes = nearest_((magnitudes / powers.view(torch.float32)).mul_(2))
    codes += (powers - ONE).bitwise_right_shift_(MANTISSA_WIDTH - 1)  # two codes for each power before
    return codes.clamp_(max=len(MAGNITUDES) - 1).nan_to_num_(0).to(torch.uint8)
