"""Rows sorted by expert, one grouped matrix product for gate and up, one for down; forward and backward by hand.

By hand, because the weight of a slot then needs no second pass over the experts' outputs, nothing of width H is kept
but the sorted rows, and on a CPU the small operations of the composed form cost as much as its products.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.experts.activations import gated_activation, gated_activation_gradient
from moebius.experts.contract import ExpertWeights, accumulation_dtype, owned_slots, weighted_sum
from moebius.experts.grouped_products import GroupedProducts
from moebius.experts.sorting import ExpertOrder, sort_by_expert


def grouped_mm_experts(
    experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """See `contract.ExpertsFunction`.  No host sync on CUDA; on the CPU it reads the offsets once.

    Differentiable once: a second derivative raises.
    """
    weights = top_k_weights.where(owned_slots(experts, top_k_index), 0)
    order = sort_by_expert(experts, top_k_index)
    if not torch.is_grad_enabled():
        return _forward(experts, hidden_states, weights, order, GroupedProducts(order.offsets)).output
    parameters = (experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias)
    return _GroupedExperts.apply(hidden_states, weights, *parameters, experts, order)  # pyright: ignore[reportReturnType]


class _Pass(NamedTuple):
    """output [T, H]; rows [S, H] and gate_up [S, 2I], in the experts' order."""

    output: Tensor
    rows: Tensor
    gate_up: Tensor


def _forward(
    experts: ExpertWeights, hidden_states: Tensor, weights: Tensor, order: ExpertOrder, products: GroupedProducts
) -> _Pass:
    rows = order.spread(hidden_states)
    gate_up = products.times_transposed(rows, experts.gate_up_proj, experts.gate_up_proj_bias)
    hidden = gated_activation(experts.activation, *gate_up.chunk(2, dim=-1))
    outputs = products.times_transposed(hidden, experts.down_proj, experts.down_proj_bias)
    return _Pass(weighted_sum(order.slots(outputs), weights, hidden_states.dtype), rows, gate_up)


class _GroupedExperts(torch.autograd.Function):
    """With z = x W1^T + b1, h = act(z), y = h W2^T + b2, out = sum_k w y, and g the gradient of out:

    p = g W2, dw = <p, h> + <g, b2>, dW2 = g^T (w h), dz = act'(z) (w p), dW1 = dz^T x, dx = sum_k dz W1
    (SonicMoE, arXiv 2512.14080: y is not needed).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_proj_bias: Tensor | None,
        down_proj_bias: Tensor | None,
        experts: ExpertWeights,
        order: ExpertOrder,
    ) -> Tensor:
        ctx.products, ctx.order, ctx.activation = GroupedProducts(order.offsets), order, experts.activation
        output, rows, gate_up = _forward(experts, hidden_states, weights, order, ctx.products)
        ctx.save_for_backward(rows, gate_up, weights, gate_up_proj, down_proj, down_proj_bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, gate_up, weights, gate_up_proj, down_proj, down_bias = ctx.saved_tensors
        products, order = ctx.products, ctx.order
        needs_states, _, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias, *_ = ctx.needs_input_grad
        grad = order.spread(grads[0])
        scale = order.sorted_slots(weights).unsqueeze(-1).to(grad.dtype)
        projected = products.times(grad, down_proj)
        hidden, gate_up_grad = gated_activation_gradient(ctx.activation, gate_up, projected * scale)
        weights_grad = _row_dots(projected, hidden)
        if down_bias is not None:
            weights_grad = weights_grad + _row_dots(grad, products.of_rows(down_bias, len(grad)))
        return (
            _added(order.slots(products.times(gate_up_grad, gate_up_proj))) if needs_states else None,
            order.slots(weights_grad).to(weights.dtype),
            products.outer(gate_up_grad, rows) if needs_gate_up else None,
            products.outer(grad, hidden * scale) if needs_down else None,
            _bias_gradient(gate_up_grad, products) if needs_gate_up_bias else None,
            _bias_gradient(grad * scale, products) if needs_down_bias else None,
            None,
            None,
        )


def _row_dots(one: Tensor, other: Tensor) -> Tensor:
    """Row by row, <one, other> [S], in float32."""
    wide = accumulation_dtype(one.dtype)
    return (one.to(wide) * other.to(wide)).sum(dim=-1)


def _added(slots: Tensor) -> Tensor:
    """The K rows of each token [T, K, H], added in float32, in their order: [T, H]."""
    wide = accumulation_dtype(slots.dtype)
    if slots.device.type == "cpu":  # a sum over so short an axis is slow there
        first, *others = slots.unbind(dim=1)
        total = first.to(wide, copy=True)
        for other in others:
            total += other
        return total.to(slots.dtype)
    return slots.sum(dim=1, dtype=wide).to(slots.dtype)


def _bias_gradient(grad: Tensor, products: GroupedProducts) -> Tensor:
    """grad [S, out] added up by expert, in float32: [E, out]."""
    num_experts = len(products.offsets)
    total = grad.new_zeros(num_experts + 1, grad.shape[1], dtype=accumulation_dtype(grad.dtype))
    total.index_add_(0, products.experts_of_rows(len(grad)), grad.to(total.dtype))
    return total[:num_experts].to(grad.dtype)
