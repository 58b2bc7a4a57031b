"""Rows sorted by expert, one grouped matrix product for gate and up, one for down.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.experts.activations import gated_activation
from moebius.experts.contract import ExpertWeights, owned_slots, weighted_sum
from moebius.experts.sorting import ExpertOrder, rows_by_expert, rows_by_token, sort_by_expert


def grouped_mm_experts(
    experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """See `contract.ExpertsFunction`.  No host sync on CUDA; on the CPU it reads the offsets once."""
    order = sort_by_expert(experts, top_k_index)
    rows = rows_by_expert(hidden_states, order)
    gate, up = _linear(rows, experts.gate_up_proj, experts.gate_up_proj_bias, order).chunk(2, dim=-1)
    hidden = gated_activation(experts.activation, gate, up)
    outputs = rows_by_token(_linear(hidden, experts.down_proj, experts.down_proj_bias, order), order)
    weights = top_k_weights.where(owned_slots(experts, top_k_index), 0)
    return weighted_sum(outputs, weights, hidden_states.dtype)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, order: ExpertOrder) -> Tensor:
    """rows [S, in] times weight [E, out, in], transposed, plus bias [E, out]: [S, out]; foreign rows come out as zero
    and pass no gradient on."""
    if rows.device.type == "cpu":
        outputs = _LoopedLinear.apply(rows, weight, _sizes(order))
        return outputs if bias is None else outputs + _row_bias(bias, order)  # pyright: ignore[reportReturnType]
    owned = (torch.arange(len(rows), device=rows.device) < order.offsets[-1]).unsqueeze(-1)
    # grouped_mm leaves rows past the last offset unwritten, in its output and in its gradient
    outputs = F.grouped_mm(rows.where(owned, 0), weight.transpose(1, 2), offs=order.offsets).where(owned, 0)
    return outputs if bias is None else outputs + _row_bias(bias, order)


def _row_bias(bias: Tensor, order: ExpertOrder) -> Tensor:
    """bias [E, out] -> [S, out]: each row's own expert's, zero on foreign rows."""
    places = torch.arange(order.order.numel(), device=bias.device, dtype=order.offsets.dtype)
    expert = torch.searchsorted(order.offsets, places, right=True)
    return F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)


def _sizes(order: ExpertOrder) -> list[int]:
    """How many rows each expert has, and last how many are foreign; read on the host."""
    ends = [0, *order.offsets.tolist(), order.order.numel()]
    return [end - start for start, end in pairwise(ends)]


class _LoopedLinear(torch.autograd.Function):
    """One product an expert, into one output.

    On the CPU `F.grouped_mm` is the same loop, but wants strides of 16 bytes and contiguous gradients.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        return _looped_product(rows, weight.mT, sizes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (rows, weight) = grad_outputs, ctx.saved_tensors
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return (
            _looped_product(grad, weight, ctx.sizes) if needs_rows else None,
            _weight_gradient(grad, rows, weight, ctx.sizes) if needs_weight else None,
            None,
        )


def _looped_product(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Each expert's rows [S, in] times its weight [E, in, out]: [S, out], zero on foreign rows."""
    outputs = rows.new_empty(len(rows), weight.shape[2])
    *outputs_of, foreign = outputs.split(sizes)
    for output, own_rows, own_weight in zip(outputs_of, rows.split(sizes), weight.unbind(), strict=False):
        if len(output):
            torch.mm(own_rows, own_weight, out=output)
    foreign.zero_()
    return outputs


def _weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Each expert's grad [S, out], transposed, times its rows [S, in]: [E, out, in], zero where it has none."""
    weight_grad = torch.empty_like(weight)
    parts = zip(weight_grad.unbind(), grad.t().split(sizes, dim=1), rows.split(sizes), strict=False)
    for own_weight_grad, own_grad, own_rows in parts:
        torch.mm(own_grad, own_rows, out=own_weight_grad)
    return weight_grad
