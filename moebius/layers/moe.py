"""The sparse feed-forward: route, run the experts, add the shared expert.

B batch, T tokens, K experts a token, H hidden.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import DenseMlp, SparseMoe
from moebius.experts.interface import Experts
from moebius.layers.mlp import Mlp
from moebius.layers.router import Router, RouterChoice

MakeExperts = Callable[[SparseMoe, int], Experts]
"""(config, hidden_size) -> the routed experts of a layer."""


class SparseMoeBlock(nn.Module):
    """[B, T, H] -> [B, T, H], and what the router chose for the B*T tokens."""

    def __init__(self, config: SparseMoe, hidden_size: int, *, make_experts: MakeExperts) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size)
        self.experts = make_experts(config, hidden_size)
        shared = config.shared_expert
        self.shared_expert = Mlp(DenseMlp(shared.intermediate_size, config.activation), hidden_size) if shared else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if shared and shared.gated else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, RouterChoice]:
        tokens = hidden_states.flatten(0, 1)
        experts = self.experts.begin(tokens)
        choice = self.gate(tokens)
        routed = partial(experts, choice.top_k_index, choice.top_k_weights)
        if self.shared_expert is None:
            output = routed()
        elif self.experts.waits and tokens.is_cuda:
            output = self._side_by_side(tokens, routed, self.shared_expert)
        else:
            output = routed() + self._shared(tokens, self.shared_expert)
        return output.view_as(hidden_states), choice

    def _shared(self, tokens: Tensor, shared_expert: Mlp) -> Tensor:
        output = shared_expert(tokens)
        return output if self.shared_expert_gate is None else F.sigmoid(self.shared_expert_gate(tokens)) * output

    def _side_by_side(self, tokens: Tensor, routed: Callable[[], Tensor], shared_expert: Mlp) -> Tensor:
        """The shared expert on a stream of its own while the routed ones wait; so too backward, which autograd runs on
        the streams of the forward.
        """
        here, side = torch.cuda.current_stream(tokens.device), _side_stream(tokens.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            shared = self._shared(tokens, shared_expert)
        tokens.record_stream(side)
        output = routed()
        here.wait_stream(side)
        shared.record_stream(here)
        return output + shared


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: work beside the experts of one layer never meets that of another."""
    return torch.cuda.Stream(device)
