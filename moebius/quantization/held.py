"""Weights that stay in a quantized form in memory, and are decoded where they are multiplied."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.quantization.decoding import dequantize, layout
from moebius.quantization.forms import Form, Spec


def room(
    form: Form, shape: Sequence[int], device: torch.device | str, segments: int = 1
) -> tuple[nn.Parameter, nn.Parameter]:
    """Values and scales of a weight of this shape, not filled, without gradient.  ArgumentError: as `layout`."""
    values, scales = (_empty(spec, device) for spec in layout(form, shape, segments))
    return values, scales


def _empty(spec: Spec, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device), requires_grad=False)


def held_linear(
    rows: Tensor, form: Form, values: Tensor, scales: Tensor, bias: Tensor | None = None, segments: int = 1
) -> Tensor:
    """rows [..., in] times the weight [out, in], transposed, plus bias [out]: [..., out], as `F.linear` with the weight
    in rows' dtype gives.

    Gradients for rows and bias.  The weight is decoded here, once more for the backward, and kept by nobody.
    """
    return _HeldLinear.apply(rows, values, scales, bias, form, segments)  # pyright: ignore[reportReturnType]


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, form: Form, segments: int
    ) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.form, ctx.segments = form, segments
        return F.linear(rows, dequantize(form, values, scales, rows.dtype, segments), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (values, scales) = grad_outputs, ctx.saved_tensors
        needs_rows, _, _, needs_bias, *_ = ctx.needs_input_grad
        rows_grad = grad @ dequantize(ctx.form, values, scales, grad.dtype, ctx.segments) if needs_rows else None
        bias_grad = grad.flatten(0, -2).sum(dim=0) if needs_bias else None
        return rows_grad, None, None, bias_grad, None, None
