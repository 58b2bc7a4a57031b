"""Which experts a token visits, and how evenly all tokens spread over them.

B batch, T tokens (all of the batch, except where [B, T] is written), K experts a token, E experts, H hidden, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import SoftmaxTopK, SparseMoe


class RouterChoice(NamedTuple):
    """router_logits [T, E] in the model's dtype; top_k_weights [T, K], in it or float32; top_k_index [T, K] int64."""

    router_logits: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor


class Router(nn.Module):
    """hidden_states [T, H] -> RouterChoice."""

    def __init__(self, config: SparseMoe, hidden_size: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.routing = config.routing
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))

    def forward(self, hidden_states: Tensor) -> RouterChoice:
        router_logits = F.linear(hidden_states, self.weight)
        match self.routing:
            case SoftmaxTopK():
                return RouterChoice(router_logits, *_softmax_top_k(self.routing, router_logits, self.top_k))


def _softmax_top_k(routing: SoftmaxTopK, router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, index = router_logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights if routing.float32_weights else weights.to(router_logits.dtype)), index


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, token_mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e, a float32 scalar (Switch Transformers, arXiv 2101.03961, equations 4-6).

    router_logits: L of [T, E], pooled over layers before the product.  token_mask: [B, T], 1 real and 0 padding.
    f_e is how many of a token's K choices fall on expert e, on average, not divided by K: perfect balance gives K.
    """
    logits = torch.stack(tuple(router_logits))
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    layers, tokens, num_experts = logits.shape
    real = torch.ones(tokens, device=logits.device) if token_mask is None else token_mask.reshape(-1).float()
    rows = layers * real.sum()
    counts = real.new_zeros(num_experts).scatter_add(0, chosen.flatten(), real.repeat_interleave(top_k).repeat(layers))
    mass = (probabilities.float() * real.unsqueeze(-1)).sum(dim=(0, 1))
    return num_experts * (counts / rows * mass / rows).sum()
