"""Rows in the experts' order and back, by permutations both ways: no atomics, so that bits repeat, and no host sync.

T tokens, K experts a token, E experts, H hidden, S = T*K rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.experts.contract import ExpertWeights, owned_slots


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

    def spread(self, tokens: Tensor) -> Tensor:
        """[T, H] -> [S, H]: each token's row at the sorted places of its slots."""
        return tokens.index_select(0, self.order // self.top_k)

    def sorted_slots(self, slots: Tensor) -> Tensor:
        """[T, K] -> [S]: the slots' numbers at their sorted places."""
        return slots.flatten().index_select(0, self.order)

    def slots(self, rows: Tensor) -> Tensor:
        """[S, ...] at sorted places -> [T, K, ...]."""
        return rows.index_select(0, self.inverse).unflatten(0, (-1, self.top_k))


def sort_by_expert(experts: ExpertWeights, top_k_index: Tensor) -> ExpertOrder:
    """top_k_index [T, K] int64 -> ExpertOrder."""
    ids = top_k_index.where(owned_slots(experts, top_k_index), experts.num_experts).flatten()
    sorted_ids, order = ids.sort(stable=True)
    ends = torch.arange(1, experts.num_experts + 1, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, ends, out_int32=True)
    places = torch.arange(order.numel(), device=order.device)
    return ExpertOrder(order, torch.empty_like(order).scatter_(0, order, places), offsets, top_k_index.shape[1])
