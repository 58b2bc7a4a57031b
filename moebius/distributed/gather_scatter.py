"""The exchange for few ranks with batches of their own: every rank has every token for a while.

N ranks; T tokens of this rank, M the most of any rank, R = N*M rows; K experts a token, H hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.distributed.collectives import (
    FOREIGN,
    Coming,
    add_and_scatter,
    gather,
    packed_routes,
    padded,
    unpacked_routes,
)
from moebius.distributed.contract import Dispatch, Exchange, Visit
from moebius.distributed.layout import ExpertLayout
from moebius.errors import ArgumentError


class GatherScatter(Exchange):
    """All-gather, own experts on all rows, reduce-scatter.

    Shapes depend on M alone, to which a rank with fewer tokens pads with rows that no expert takes.
    """

    def __init__(self, group: dist.ProcessGroup, layout: ExpertLayout):
        super().__init__(group, layout)
        self.sizes = Sizes(group)

    def expect(self, tokens: Sequence[int]) -> None:
        self.sizes.expect(tokens)

    def begin(self, hidden_states: Tensor) -> Dispatch:
        """States travel while the router chooses."""
        own, longest = hidden_states.shape[0], self.sizes.longest(hidden_states)
        coming = gather(padded(hidden_states.detach(), longest), self.group)

        def dispatch(states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
            rows, index, weights, anchor = _Gather.apply(states, top_k_index, top_k_weights, longest, coming)  # pyright: ignore[reportGeneralTypeIssues]
            return Visit(rows, index, weights, lambda output: _Scatter.apply(output, anchor, own, self.group))

        return dispatch

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        return self.begin(hidden_states)(hidden_states, top_k_index, top_k_weights)


class Sizes:
    """How many tokens each rank brings: as was said before the step, or else asked of them.

    Asked, too, where a backward computes a layer again: of several forwards before it, the last one was said last.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self._expected: Sequence[int] | None = None

    def expect(self, tokens: Sequence[int]) -> None:
        self._expected = tokens

    def longest(self, hidden_states: Tensor) -> int:
        """M, of hidden_states [T, H].  ArgumentError: T is not what was said."""
        own = hidden_states.shape[0]
        if self._expected is None or _within_backward():
            return max(self._asked(own, hidden_states.device))
        if self._expected[self.group.rank()] != own:
            raise ArgumentError(
                f"rank {dist.get_rank()} brings {own} tokens to its experts, where the step was announced with "
                f"{self._expected[self.group.rank()]}",
                advice="call the whole model, not a part of it; a CUDA graph has to be captured after a run like it",
            )
        return max(self._expected)

    def _asked(self, own: int, device: torch.device) -> list[int]:
        return gather(torch.tensor([own], device=device), self.group).arrived().tolist()


def _within_backward() -> bool:
    """Of this thread, as torch's own checkpoint and FSDP2 ask it; there is no public way."""
    return torch._C._current_graph_task_id() != -1


class _Gather(torch.autograd.Function):
    """coming: hidden_states of all ranks, which set out without a graph; here they are joined to it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, index: Tensor, weights: Tensor, longest: int, coming: Coming
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.tokens, ctx.group = hidden_states.shape[0], coming.group
        routes = packed_routes(padded(index, longest, FOREIGN), padded(weights, longest))
        index, weights = unpacked_routes(gather(routes, coming.group).arrived(), weights)
        ctx.mark_non_differentiable(index)
        return coming.arrived(), index, weights, hidden_states.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, _, weights, _ = grad_outputs
        own_rows, own_weights = add_and_scatter(rows, ctx.group), add_and_scatter(weights, ctx.group)
        return own_rows[: ctx.tokens], None, own_weights[: ctx.tokens], None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.longest, ctx.group = output.shape[0] // group.size(), group
        own = add_and_scatter(output, group)
        return own if tokens == ctx.longest else own[:tokens].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        return gather(padded(grad, ctx.longest), ctx.group).arrived(), grad.new_zeros(1), None, None
