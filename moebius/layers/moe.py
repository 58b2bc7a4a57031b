"""The sparse feed-forward: route, run the experts, add the shared expert.

B batch, T tokens, K experts a token, H hidden.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import DenseMlp, SparseMoe
from moebius.experts.interface import Experts
from moebius.layers.mlp import Mlp
from moebius.layers.router import Router, RouterChoice


class SparseMoeBlock(nn.Module):
    """[B, T, H] -> [B, T, H], and what the router chose for the B*T tokens."""

    def __init__(self, config: SparseMoe, hidden_size: int, *, experts_implementation: str) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size, experts_implementation=experts_implementation)
        shared = config.shared_expert
        self.shared_expert = Mlp(DenseMlp(shared.intermediate_size, config.activation), hidden_size) if shared else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if shared and shared.gated else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, RouterChoice]:
        tokens = hidden_states.flatten(0, 1)
        choice = self.gate(tokens)
        output = self.experts(tokens, choice.top_k_index, choice.top_k_weights)
        if self.shared_expert is not None:
            output = output + self._shared(tokens, self.shared_expert)
        return output.view_as(hidden_states), choice

    def _shared(self, tokens: Tensor, shared_expert: Mlp) -> Tensor:
        output = shared_expert(tokens)
        return output if self.shared_expert_gate is None else F.sigmoid(self.shared_expert_gate(tokens)) * output
