"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.4.2), pairs (i, i + R/2).

B batch, T tokens, D head_dim, R rotary_dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.config import Rope

RotaryTables = tuple[Tensor, Tensor]
"""cos, and sin with the sign that its half of a pair takes: each [B or 1, 1, T, R]."""


def rotary_tables(rope: Rope, position_ids: Tensor, dtype: torch.dtype) -> RotaryTables:
    """position_ids [B or 1, T] -> cos and signed sin of position * theta^(-2i/R), in float32, then cast to `dtype`."""
    channels = torch.arange(0, rope.rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = 1.0 / rope.theta ** (channels / rope.rotary_dim)
    angles = (position_ids.unsqueeze(-1).float() * inverse_frequency).unsqueeze(1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class _Rotate(torch.autograd.Function):
    """The rotation of [B, heads, T, D]; its gradient is the rotation back, so that nothing but the tables is kept.

    States come from a projection, token by token, and go to products, head by head; gradients go the other way. Either
    is written in the order in which it is read next, which saves a copy.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_into(states.new_empty(states.shape), states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (cos, sin) = grad_outputs, ctx.saved_tensors
        batch, heads, tokens, head_dim = grad.shape
        by_token = grad.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
        return _rotate_into(by_token, grad, cos, -sin), None, None


def _rotate_into(turned: Tensor, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim, half = cos.shape[-1], cos.shape[-1] // 2
    first, second = (slice(half), slice(half, rotary_dim))
    torch.mul(states[..., :rotary_dim], cos, out=turned[..., :rotary_dim])
    turned[..., first].addcmul_(states[..., second], sin[..., first])
    turned[..., second].addcmul_(states[..., first], sin[..., second])
    if rotary_dim < states.shape[-1]:
        turned[..., rotary_dim:] = states[..., rotary_dim:]
    return turned


def apply_rotary(states: Tensor, tables: RotaryTables) -> Tensor:
    """states [B, heads, T, D]: its first R channels rotated, the others as they are."""
    return _Rotate.apply(states, *tables)  # pyright: ignore[reportReturnType]
