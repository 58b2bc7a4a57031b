"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.4.2), and YaRN's frequencies for long contexts.

B batch, T tokens, D head_dim, R rotary_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.config import Rope, Yarn

RotaryTables = tuple[Tensor, Tensor]
"""cos, and sin with the sign that its half of a pair takes: each [B or 1, 1, T, R]."""


def rotary_tables(rope: Rope, position_ids: Tensor, dtype: torch.dtype) -> RotaryTables:
    """position_ids [B or 1, T] -> cos and signed sin of position * frequency, in float32, then cast to `dtype`."""
    frequencies = inverse_frequencies(rope, position_ids.device)
    angles = (position_ids.unsqueeze(-1).float() * frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    if rope.yarn is not None:
        factor = attention_factor(rope.yarn)
        cos, sin = cos * factor, sin * factor
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def inverse_frequencies(rope: Rope, device: torch.device | str | None = None) -> Tensor:
    """float32 [R/2]: radians a position, theta^(-2i/R).

    With YaRN, where a channel turns less often than beta_slow over the original length, divided by the factor; where
    more often than beta_fast, kept; in between, a blend (arXiv 2309.00071, section 3.2).
    """
    channels = torch.arange(0, rope.rotary_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / rope.theta ** (channels / rope.rotary_dim)
    if rope.yarn is None:
        return frequencies
    low, high = _blended_channels(rope, rope.yarn)
    ramp = ((torch.arange(len(channels), device=device) - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / rope.yarn.factor * ramp


def _blended_channels(rope: Rope, yarn: Yarn) -> tuple[float, float]:
    """Between which channels frequencies are blended; a step where both bounds are one."""
    low, high = (_channel_of(rope, yarn, rotations) for rotations in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, (high + 0.001 if low == high else high)


def _channel_of(rope: Rope, yarn: Yarn, rotations: float) -> float:
    """The channel, not whole, that turns so often over the original length: theta^(-2i/R) * length = 2 pi rotations."""
    wavelength = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
    return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def attention_factor(yarn: Yarn) -> float:
    """What cos and sin are multiplied by: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), unless given.

    Two mscales give the quotient of theirs instead (DeepSeek-V2, arXiv 2405.04434, section 3.1.4); zero counts as none.
    """
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _magnitude(yarn, yarn.mscale) / _magnitude(yarn, yarn.mscale_all_dim)
    return _magnitude(yarn, 1.0)


def softmax_scale_factor(rope: Rope) -> float:
    """What multi-head latent attention multiplies its scores by, beside width ** -0.5: (0.1 mscale_all_dim ln(factor)
    + 1) ** 2, once for queries and once for keys, on all channels; 1 without YaRN or mscale_all_dim.
    """
    if rope.yarn is None or not rope.yarn.mscale_all_dim:
        return 1.0
    return _magnitude(rope.yarn, rope.yarn.mscale_all_dim) ** 2


def _magnitude(yarn: Yarn, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


class _Rotate(torch.autograd.Function):
    """The rotation of [B, heads, T, D]; its gradient is the rotation back, so that nothing but the tables is kept.

    States come from a projection, token by token, and go to products, head by head; gradients go the other way. Either
    is written in the order in which it is read next, which saves a copy.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        turned = states.new_empty(states.shape)
        rotary_dim = cos.shape[-1]
        _rotate_into(_halves(turned, rotary_dim), _pairs(states, rotary_dim, interleaved), cos, sin)
        return _with_rest(turned, states, rotary_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (cos, sin) = grad_outputs, ctx.saved_tensors
        batch, heads, tokens, head_dim = grad.shape
        by_token = grad.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
        rotary_dim = cos.shape[-1]
        _rotate_into(_pairs(by_token, rotary_dim, ctx.interleaved), _halves(grad, rotary_dim), cos, -sin)
        return _with_rest(by_token, grad, rotary_dim), None, None, None


def _halves(states: Tensor, rotary_dim: int) -> Tensor:
    """A view [..., 2, R/2] of pairs (i, i + R/2)."""
    return states[..., :rotary_dim].unflatten(-1, (2, -1))


def _pairs(states: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """A view [..., 2, R/2] of pairs (i, i + R/2), or (2i, 2i + 1) if interleaved."""
    if not interleaved:
        return _halves(states, rotary_dim)
    return states[..., :rotary_dim].unflatten(-1, (-1, 2)).transpose(-1, -2)


def _rotate_into(turned: Tensor, pairs: Tensor, cos: Tensor, sin: Tensor) -> None:
    """turned, pairs: [..., 2, R/2]."""
    cos, sin = cos.unflatten(-1, (2, -1)), sin.unflatten(-1, (2, -1))
    torch.mul(pairs, cos, out=turned)
    turned[..., 0, :].addcmul_(pairs[..., 1, :], sin[..., 0, :])
    turned[..., 1, :].addcmul_(pairs[..., 0, :], sin[..., 1, :])


def _with_rest(turned: Tensor, states: Tensor, rotary_dim: int) -> Tensor:
    if rotary_dim < states.shape[-1]:
        turned[..., rotary_dim:] = states[..., rotary_dim:]
    return turned


def apply_rotary(states: Tensor, tables: RotaryTables, *, interleaved: bool = False) -> Tensor:
    """states [B, heads, T, D]: its first R channels rotated, the others as they are.

    Pairs are (i, i + R/2); interleaved: (2i, 2i + 1), and come out as (i, i + R/2), which changes no product of two
    states that are both rotated here.
    """
    return _Rotate.apply(states, *tables, interleaved)  # pyright: ignore[reportReturnType]
