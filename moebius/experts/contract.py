"""What a backend is given: the weights of a layer's experts, and the signature it has to have.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moebius.config import Activation
from moebius.quantization.forms import Form

SEGMENTS = {"gate_up_proj": 2, "down_proj": 1}
"""The projections, and how many matrices each stacks: block scales of gate and up begin anew."""


class ExpertWeights(Protocol):
    """The experts of one layer, packed, gate rows first.  What a backend may read; `interface.Experts` is one.

    A projection whose form is not None is held quantized: it is the form's values, and its scale is not None.
    """

    @property
    def gate_up_proj(self) -> Tensor: ...  # [E, 2I, H]
    @property
    def gate_up_proj_form(self) -> Form | None: ...
    @property
    def gate_up_proj_scale(self) -> Tensor | None: ...
    @property
    def down_proj(self) -> Tensor: ...  # [E, H, I]
    @property
    def down_proj_form(self) -> Form | None: ...
    @property
    def down_proj_scale(self) -> Tensor | None: ...
    @property
    def gate_up_proj_bias(self) -> Tensor | None: ...  # [E, 2I], or None where the family has none
    @property
    def down_proj_bias(self) -> Tensor | None: ...  # [E, H]
    @property
    def activation(self) -> Activation: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_routed(self) -> int: ...  # experts that ids are drawn from: num_experts, or more where others are elsewhere


ExpertsFunction = Callable[[ExpertWeights, Tensor, Tensor, Tensor], Tensor]
"""(experts, hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K]) -> [T, H] in hidden_states' dtype.

A slot whose id is outside [0, num_experts) adds nothing, is not read, and gives its weight a zero gradient.  The K rows
of a token are added in float32 and rounded once.  Inputs are not changed, and the result, which the caller may change,
is no part of them.  T = 0 gives an empty result, joined to the graph.
"""


def owned_slots(experts: ExpertWeights, top_k_index: Tensor) -> Tensor:
    """Which slots name one of these experts.  [T, K] ids -> [T, K] bool."""
    return (top_k_index >= 0) & (top_k_index < experts.num_experts)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def weighted_sum(rows: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token's K rows [T, K, H] times its weights [T, K], added in float32 and rounded once to `dtype`: [T, H]."""
    wide = accumulation_dtype(dtype)
    weights = top_k_weights.to(wide).unsqueeze(-1)
    if rows.device.type != "cpu" or rows.requires_grad:
        return (rows.to(wide) * weights).sum(dim=1).to(dtype)
    # a sum over so short an axis is slow on a CPU: three times the time of adding slot by slot
    total = rows[:, 0].to(wide) * weights[:, 0]
    for slot in range(1, rows.shape[1]):
        total.addcmul_(rows[:, slot].to(wide), weights[:, slot])
    return total.to(dtype)
