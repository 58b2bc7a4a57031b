"""One expert at a time: the plain form that defines what is correct and judges every other backend.

T tokens, K experts a token, E experts, H hidden, I intermediate, S rows of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.experts.activations import gated_activation
from moebius.experts.contract import SEGMENTS, ExpertWeights, accumulation_dtype, owned_slots
from moebius.quantization.forms import Form
from moebius.quantization.held import held_linear


def eager_experts(experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See `contract.ExpertsFunction`.  Reads the ids on the host.

    Takes experts in quantized forms, of which it decodes one projection at a time, in the forward and again in the
    backward; these get no gradient.
    """
    wide = accumulation_dtype(hidden_states.dtype)
    output = torch.zeros_like(hidden_states, dtype=wide)
    gate_up_proj, down_proj = _gate_up_proj(experts), _down_proj(experts)
    for expert in _experts_hit(experts, top_k_index):
        token, slot = torch.where(top_k_index == expert)
        gate, up = gate_up_proj.of(expert, hidden_states[token]).chunk(2, dim=-1)
        rows = down_proj.of(expert, gated_activation(experts.activation, gate, up))
        output = output.index_add(0, token, rows.to(wide) * top_k_weights[token, slot].to(wide).unsqueeze(-1))
    return output.to(hidden_states.dtype)


@dataclass
class _Projection:
    """The matrices of all experts, plain or in a form, by expert."""

    matrices: Sequence[Tensor]
    biases: Tensor | None
    form: Form | None
    scales: Tensor | None
    segments: int

    def of(self, expert: int, rows: Tensor) -> Tensor:
        """rows [S, in] through one expert: [S, out]."""
        bias = None if self.biases is None else self.biases[expert]
        if self.form is None or self.scales is None:
            return F.linear(rows, self.matrices[expert], bias)
        return held_linear(rows, self.form, self.matrices[expert], self.scales[expert], bias, self.segments)


def _gate_up_proj(experts: ExpertWeights) -> _Projection:
    return _Projection(
        _unbound(experts.gate_up_proj),
        experts.gate_up_proj_bias,
        experts.gate_up_proj_form,
        experts.gate_up_proj_scale,
        SEGMENTS["gate_up_proj"],
    )


def _down_proj(experts: ExpertWeights) -> _Projection:
    return _Projection(
        _unbound(experts.down_proj),
        experts.down_proj_bias,
        experts.down_proj_form,
        experts.down_proj_scale,
        SEGMENTS["down_proj"],
    )


def _unbound(packed: Tensor) -> Sequence[Tensor]:
    """At once: indexing the packed parameter for each expert would write a gradient of its full size for each."""
    return packed.unbind()


def _experts_hit(experts: ExpertWeights, top_k_index: Tensor) -> list[int]:
    """The experts with at least one row; where there is none, expert 0 without rows, which joins the graph."""
    return top_k_index[owned_slots(experts, top_k_index)].unique().tolist() or [0]
