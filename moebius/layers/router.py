"""Which experts a token visits, and how evenly all tokens spread over them.

B batch, T tokens (all of the batch, except where [B, T] is written), K experts a token, E experts, H hidden, L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import Routing, SigmoidTopK, SoftmaxGroupTopK, SoftmaxTopK, SparseMoe, TopKSoftmax
from moebius.errors import ConfigError
from moebius.quantization.fixed_dtypes import FixedDtypes


class RouterChoice(NamedTuple):
    """router_logits [T, E] in the model's dtype, or float32 where the routing is computed so; top_k_weights [T, K], in
    the logits' dtype or float32; top_k_index [T, K] int64, in no order that means anything.
    """

    router_logits: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor


class Router(FixedDtypes):
    """hidden_states [T, H] -> RouterChoice.

    weight [E, H]; with TopKSoftmax a bias [E]; with SigmoidTopK a buffer e_score_correction_bias [E], which is float32
    in a model of any dtype, as is the weight if float32_gate asks for it.
    ConfigError: the experts cannot be grouped as the routing says.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: SparseMoe, hidden_size: int) -> None:
        super().__init__()
        _check_groups(config)
        num_experts, self.top_k, self.routing = config.num_experts, config.top_k, config.routing
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=_weight_dtype(config.routing)))
        self.bias = nn.Parameter(torch.empty(num_experts)) if isinstance(config.routing, TopKSoftmax) else None
        if isinstance(config.routing, SigmoidTopK):
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
            self.fix_dtypes("e_score_correction_bias", *(["weight"] if config.routing.float32_gate else []))

    def forward(self, hidden_states: Tensor) -> RouterChoice:
        logits = self._logits(hidden_states)
        return RouterChoice(logits, *self._choose(logits))

    def _logits(self, hidden_states: Tensor) -> Tensor:
        match self.routing:
            case SoftmaxTopK() | TopKSoftmax():
                return F.linear(hidden_states, self.weight, self.bias)
            case SoftmaxGroupTopK() | SigmoidTopK():
                with torch.autocast(hidden_states.device.type, enabled=False):  # float32 even there
                    return F.linear(hidden_states.float(), self.weight.float())

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        match self.routing:
            case SoftmaxTopK():
                return _softmax_top_k(self.routing, logits, self.top_k)
            case TopKSoftmax():
                return _top_k_softmax(logits, self.top_k)
            case SoftmaxGroupTopK():
                return _softmax_group_top_k(self.routing, logits, self.top_k)
            case SigmoidTopK():
                return _sigmoid_top_k(self.routing, logits, self.top_k, self.e_score_correction_bias)


def _weight_dtype(routing: Routing) -> torch.dtype | None:
    """None: the model's."""
    return torch.float32 if isinstance(routing, SigmoidTopK) and routing.float32_gate else None


def _check_groups(config: SparseMoe) -> None:
    match config.routing:
        case SoftmaxGroupTopK(groups, kept) | SigmoidTopK(_, groups, kept):
            fits = config.num_experts % groups == 0 and kept <= groups
            if not fits or config.top_k > config.num_experts // groups * kept:
                raise ConfigError(
                    f"routing: cannot choose {config.top_k} experts out of {kept} of {groups} equal groups of "
                    f"{config.num_experts} experts"
                )


def _softmax_top_k(routing: SoftmaxTopK, router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, index = router_logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights if routing.float32_weights else weights.to(router_logits.dtype)), index


def _top_k_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    chosen, index = logits.topk(top_k, dim=-1)
    return chosen.softmax(dim=-1), index


def _softmax_group_top_k(routing: SoftmaxGroupTopK, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1)
    if routing.num_groups > 1:
        best = scores.unflatten(-1, (routing.num_groups, -1)).amax(dim=-1)
        scores = scores.masked_fill(_outside(best, routing.top_groups, scores), 0.0)
    weights, index = scores.topk(top_k, dim=-1)
    return weights * routing.scale, index


def _sigmoid_top_k(routing: SigmoidTopK, logits: Tensor, top_k: int, correction_bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    corrected = scores + correction_bias
    if routing.num_groups > 1:
        best = corrected.unflatten(-1, (routing.num_groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
        corrected = corrected.masked_fill(_outside(best, routing.top_groups, corrected), -torch.inf)
    index = corrected.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, index)  # not the corrected ones: the correction balances load, it is no part of the sum
    if routing.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + routing.epsilon)
    return weights * routing.scale, index


def _outside(group_scores: Tensor, top_groups: int, scores: Tensor) -> Tensor:
    """group_scores [T, groups], scores [T, E] -> [T, E] bool: the experts of all groups but the best."""
    best = group_scores.topk(top_groups, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return outside.repeat_interleave(scores.shape[-1] // group_scores.shape[-1], dim=-1)


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    token_mask: Tensor | None = None,
    *,
    pooled: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """E * sum_e f_e P_e, a float32 scalar (Switch Transformers, arXiv 2101.03961, equations 4-6).

    router_logits: L of [T, E], pooled over layers before the product.  token_mask: [B, T], 1 real and 0 padding.
    f_e is how many of a token's K choices fall on expert e, on average, not divided by K: perfect balance gives K.
    pooled: counts [E + 1] float32 of these tokens (each expert's, and all) -> those of a larger batch, of which these
    tokens are a part; the losses of all parts then add up to that of the batch.
    """
    logits = torch.stack(tuple(router_logits))
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    layers, tokens, num_experts = logits.shape
    real = torch.ones(tokens, device=logits.device) if token_mask is None else token_mask.reshape(-1).float()
    counts = real.new_zeros(num_experts).scatter_add(0, chosen.flatten(), real.repeat_interleave(top_k).repeat(layers))
    counts, rows = pooled(torch.cat([counts, layers * real.sum().unsqueeze(0)])).split([num_experts, 1])
    mass = (probabilities.float() * real.unsqueeze(-1)).sum(dim=(0, 1))
    return num_experts * (counts / rows * mass / rows).sum()
