"""One expert at a time: the plain form that defines what is correct and judges every other backend.

T tokens, K experts a token, E experts, H hidden, I intermediate, S rows of one expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.experts.activations import gated_activation
from moebius.experts.contract import ExpertWeights, accumulation_dtype, owned_slots


def eager_experts(experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See `contract.ExpertsFunction`.  Reads the ids on the host."""
    wide = accumulation_dtype(hidden_states.dtype)
    output = torch.zeros_like(hidden_states, dtype=wide)
    # unbind once: indexing the packed parameter inside the loop would write a gradient of its full size for each expert
    gate_up_proj, down_proj = experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    for expert in _experts_hit(experts, top_k_index):
        token, slot = torch.where(top_k_index == expert)
        rows = _one_expert(experts, expert, gate_up_proj[expert], down_proj[expert], hidden_states[token])
        output = output.index_add(0, token, rows.to(wide) * top_k_weights[token, slot].to(wide).unsqueeze(-1))
    return output.to(hidden_states.dtype)


def _one_expert(experts: ExpertWeights, expert: int, gate_up_proj: Tensor, down_proj: Tensor, rows: Tensor) -> Tensor:
    """rows [S, H] through one expert: [S, H]."""
    gate_up_bias = None if experts.gate_up_proj_bias is None else experts.gate_up_proj_bias[expert]
    down_bias = None if experts.down_proj_bias is None else experts.down_proj_bias[expert]
    gate, up = F.linear(rows, gate_up_proj, gate_up_bias).chunk(2, dim=-1)
    return F.linear(gated_activation(experts.activation, gate, up), down_proj, down_bias)


def _experts_hit(experts: ExpertWeights, top_k_index: Tensor) -> list[int]:
    """The experts with at least one row; where there is none, expert 0 without rows, which joins the graph."""
    return top_k_index[owned_slots(experts, top_k_index)].unique().tolist() or [0]
