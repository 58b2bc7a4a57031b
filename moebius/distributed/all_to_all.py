"""The exchange for many ranks with batches of their own: a token travels to those ranks alone that have its experts.

N ranks; T tokens of this rank, S rows that it sends: one a token and rank that it visits; R rows that it works on;
E experts, K experts a token, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.distributed.collectives import packed_routes, swap, unpacked_routes
from moebius.distributed.contract import Exchange, Visit
from moebius.distributed.layout import ExpertLayout
from moebius.errors import BackendError
from moebius.experts.contract import accumulation_dtype


class AllToAll(Exchange):
    """Sums over a rank's experts come back, and are added in float32 in the order of ranks: bits repeat."""

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "the exchange all_to_all reads on the host how many rows travel: a CUDA graph cannot hold it",
                advice='take exchange="gather_scatter", or leave that step out of graphs',
            )
        trip = _plan(top_k_index, self.layout, self.group)
        rows, index, weights, anchor = _Send.apply(hidden_states, top_k_index, top_k_weights, trip)  # pyright: ignore[reportGeneralTypeIssues]
        return Visit(rows, index, weights, lambda output: _Return.apply(output, anchor, trip))


@dataclass(frozen=True)
class Trip:
    """Which rows travel.

    token [S]: which token each sent row is, by rank and then by token.  sent, received [N]: rows to and from each rank.
    """

    token: Tensor
    tokens: int
    sent: Sequence[int]
    received: Sequence[int]
    group: dist.ProcessGroup

    def there(self, rows: Tensor) -> Tensor:
        """[T, ...] of tokens -> [R, ...] where their experts are."""
        return swap(rows.index_select(0, self.token), self.sent, self.received, self.group).arrived()

    def back(self, rows: Tensor) -> Tensor:
        """[R, ...] of all ranks' tokens -> [T, ...]: the sums over the ranks that each token visited."""
        home = swap(rows, self.received, self.sent, self.group).arrived()
        total = home.new_zeros(self.tokens, *home.shape[1:], dtype=accumulation_dtype(home.dtype))
        for token, of_rank in zip(self.token.split(self.sent), home.split(self.sent), strict=True):
            total.index_add_(0, token, of_rank.to(total.dtype))  # no token twice, so that the order is that of ranks
        return total.to(home.dtype)


def _plan(top_k_index: Tensor, layout: ExpertLayout, group: dist.ProcessGroup) -> Trip:
    """Reads the counts on the host, once."""
    visits = _visits(top_k_index, layout)
    counts = visits.sum(dim=1)
    ones = [1] * layout.ranks
    sent, received = torch.stack([counts, swap(counts, ones, ones, group).arrived()]).tolist()
    places = visits.logical_not().flatten().to(torch.uint8).argsort(stable=True)[: sum(sent)]
    tokens = top_k_index.shape[0]
    return Trip(places % max(tokens, 1), tokens, sent, received, group)


def _visits(top_k_index: Tensor, layout: ExpertLayout) -> Tensor:
    """[T, K] ids -> [N, T] bool: whether a token has an expert on a rank."""
    each, more = divmod(layout.num_experts, layout.ranks)
    rank = torch.arange(layout.ranks + 1, device=top_k_index.device)
    bounds = (rank * each + rank.clamp(max=more)).view(-1, 1, 1)  # as the layout has them, without a copy to the device
    return ((top_k_index >= bounds[:-1]) & (top_k_index < bounds[1:])).any(dim=-1)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, index: Tensor, weights: Tensor, trip: Trip
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.trip = trip
        routes = trip.there(packed_routes(index, weights))
        index, weights = unpacked_routes(routes, weights)
        ctx.mark_non_differentiable(index)
        return trip.there(hidden_states), index, weights, hidden_states.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, _, weights, _ = grad_outputs
        return ctx.trip.back(rows), None, ctx.trip.back(weights), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.back(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return ctx.trip.there(grad), grad.new_zeros(1), None
