"""The exchange for one batch that all ranks share: nothing travels there, and sums come back.

T tokens, the same on every rank; K experts a token, H hidden.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.distributed.collectives import add
from moebius.distributed.contract import Exchange, Visit


class AllReduce(Exchange):
    """Every rank runs its own experts on all tokens, and the outputs are added up."""

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        states, weights, anchor = _Share.apply(hidden_states, top_k_weights, self.group)  # pyright: ignore[reportGeneralTypeIssues]
        return Visit(states, top_k_index, weights, lambda output: _Add.apply(output, anchor, self.group))


class _Share(torch.autograd.Function):
    """The same there; backward, every rank's gradients are a part of the whole."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        return hidden_states.view_as(hidden_states), top_k_weights.view_as(top_k_weights), hidden_states.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        states, weights, _ = grad_outputs
        return add(states.clone(), ctx.group), add(weights.clone(), ctx.group), None


class _Add(torch.autograd.Function):
    """The sum of all ranks' outputs; what comes back for it every rank has already."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, group: dist.ProcessGroup) -> Tensor:
        # a step before this one may have kept its output for its backward
        return add(output.clone() if ctx.needs_input_grad[0] else output, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return grad, grad.new_zeros(1), None
