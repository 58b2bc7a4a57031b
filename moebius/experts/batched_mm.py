"""Every slot multiplies a copy of its expert's weights: no sorting, for very few tokens.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

import torch
from torch import Tensor

from moebius.experts.activations import gated_activation
from moebius.experts.contract import ExpertWeights, owned_slots, weighted_sum


def batched_mm_experts(
    experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """See `contract.ExpertsFunction`.  Copies S * 3 * I * H weights; no host sync.

    Each row's share of a weight's gradient is added in the weight's dtype: in bfloat16 that gradient is coarser than
    the other backends'.
    """
    owned = owned_slots(experts, top_k_index)
    index = top_k_index.where(owned, 0).flatten()
    # masked on the way in as well as out: a foreign slot may stand beside a row of NaN, and NaN times zero is NaN
    rows = hidden_states.unsqueeze(1).where(owned.unsqueeze(-1), 0).flatten(0, 1)
    gate, up = _matmul(rows, experts.gate_up_proj, experts.gate_up_proj_bias, index).chunk(2, dim=-1)
    hidden = gated_activation(experts.activation, gate, up)
    outputs = _matmul(hidden, experts.down_proj, experts.down_proj_bias, index)
    outputs = outputs.unflatten(0, top_k_index.shape).where(owned.unsqueeze(-1), 0)
    return weighted_sum(outputs, top_k_weights.where(owned, 0), hidden_states.dtype)


def _matmul(rows: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """rows [S, in] times weight[index] [S, out, in], transposed, plus bias[index]: [S, out]."""
    matrices, columns = weight[index], rows.unsqueeze(-1)
    if bias is None:
        return torch.bmm(matrices, columns).squeeze(-1)
    return torch.baddbmm(bias[index].unsqueeze(-1), matrices, columns).squeeze(-1)
