"""Rows in the experts' order and back, by permutations both ways: no atomics, so that bits repeat, and no host sync.

T tokens, K experts a token, E experts, H hidden, S = T*K rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.experts.contract import ExpertWeights, accumulation_dtype, owned_slots


@dataclass(frozen=True)
class ExpertOrder:
    """Slots sorted by expert, ties in token order; foreign slots stand last.

    order [S]: the slot (token * K + k) at each sorted place.  inverse [S]: the sorted place of each slot.
    offsets [E] int32: where each expert's rows end; offsets[-1] is where foreign rows begin.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    top_k: int


def sort_by_expert(experts: ExpertWeights, top_k_index: Tensor) -> ExpertOrder:
    """top_k_index [T, K] int64 -> ExpertOrder."""
    ids = top_k_index.where(owned_slots(experts, top_k_index), experts.num_experts).flatten()
    sorted_ids, order = ids.sort(stable=True)
    ends = torch.arange(1, experts.num_experts + 1, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, ends, out_int32=True)
    places = torch.arange(order.numel(), device=order.device)
    return ExpertOrder(order, torch.empty_like(order).scatter_(0, order, places), offsets, top_k_index.shape[1])


class _GatherRows(torch.autograd.Function):
    """hidden_states [T, H] -> [S, H] sorted; the gradient adds each token's K rows in float32, in slot order."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, expert_order: ExpertOrder) -> Tensor:
        ctx.expert_order = expert_order
        return hidden_states.index_select(0, expert_order.order // expert_order.top_k)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        slots = grad.index_select(0, ctx.expert_order.inverse).unflatten(0, (-1, ctx.expert_order.top_k))
        return slots.sum(dim=1, dtype=accumulation_dtype(grad.dtype)).to(grad.dtype), None


class _PermuteRows(torch.autograd.Function):
    """rows [S, H] in the experts' order -> [S, H] in the slots' order."""

    @staticmethod
    def forward(ctx, rows: Tensor, expert_order: ExpertOrder) -> Tensor:
        ctx.expert_order = expert_order
        return rows.index_select(0, expert_order.inverse)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        return grad.index_select(0, ctx.expert_order.order), None


def rows_by_expert(hidden_states: Tensor, expert_order: ExpertOrder) -> Tensor:
    """hidden_states [T, H] -> [S, H], a row for each slot, in the experts' order."""
    return _GatherRows.apply(hidden_states, expert_order)  # pyright: ignore[reportReturnType]


def rows_by_token(rows: Tensor, expert_order: ExpertOrder) -> Tensor:
    """rows [S, H] in the experts' order -> [T, K, H]."""
    permuted = _PermuteRows.apply(rows, expert_order)
    return permuted.unflatten(0, (-1, expert_order.top_k))  # pyright: ignore[reportAttributeAccessIssue]
