"""Normalisation.  H the normalised width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import RmsNorm


class RmsNormLayer(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype, then times the weight (Zhang and Sennrich 2019, eq. 4);
    with scale_in_float32, times the weight before the cast.

    [..., H] -> [..., H].
    """

    def __init__(self, config: RmsNorm, width: int) -> None:
        super().__init__()
        self.eps, self.scale_in_float32 = config.eps, config.scale_in_float32
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type == "cpu" and hidden_states.dtype == self.weight.dtype == torch.float32:
            return _Float32RmsNorm.apply(hidden_states, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return rms_norm(hidden_states, self.weight, self.eps, scale_in_float32=self.scale_in_float32)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, *, scale_in_float32: bool = False) -> Tensor:
    """The plain form, for any dtype.

    `F.rms_norm` scales in float32. Where checkpoints were trained with the weight after the cast it stays outside:
    bfloat16 is then rounded twice instead of once, and a quarter of all values differ in their last bit.
    """
    if scale_in_float32:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    return F.rms_norm(hidden_states, weight.shape, None, eps) * weight


class _Float32RmsNorm(torch.autograd.Function):
    """`rms_norm` in float32, where both orders are one, with its gradient by hand: in small pieces on a CPU, torch's
    takes four times as long.

    With n = x r and r = 1 / sqrt(mean(x^2) + eps): dw = sum(dy n), dx = r (w dy - n mean(w dy n)).
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        scale = (length.square() / weight.numel() + eps).rsqrt()
        ctx.save_for_backward(hidden_states, weight, scale)
        return (hidden_states * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_states, weight, scale = ctx.saved_tensors
        normed, (grad,) = hidden_states * scale, grad_outputs
        product = grad * normed
        mean = (product @ weight).unsqueeze(-1) / weight.numel()
        hidden_grad = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return hidden_grad, product.flatten(0, -2).sum(dim=0), None
