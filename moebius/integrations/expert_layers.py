"""A transformers module of experts as one of ours: its own parameters, as views, and never a copy.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moebius.config import Activation
from moebius.errors import BackendError, Fault
from moebius.experts.contract import owned_slots, weighted_sum
from moebius.experts.eager import eager_experts
from moebius.experts.grouped_products import GroupedProducts
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from moebius.experts.select import Situation, backend_obstacles
from moebius.experts.sorting import ExpertOrder, sort_by_expert
from moebius.integrations.expert_variants import Variant
from moebius.quantization.forms import Form

logger = logging.getLogger(__name__)


class _Views(nn.Module):
    """The module's parameters, read anew each time, [E, out, in] however it stores them."""

    def __init__(self, module: nn.Module, variant: Variant):
        super().__init__()
        self.variant = variant
        self._reference = weakref.ref(module)  # the module is the key under which this is kept

    @property
    def module(self) -> Any:
        return self._reference()

    @property
    def num_experts(self) -> int:
        return self.module.down_proj.shape[0]  # of this rank

    @property
    def num_routed(self) -> int:
        return self.num_experts

    @property
    def down_proj(self) -> Tensor:
        return self.oriented(self.module.down_proj)

    @property
    def down_proj_bias(self) -> Tensor | None:
        return self.module.down_proj_bias if self.variant.has_bias else None

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self.variant.is_transposed else weight


@use_experts_implementation
class MappedExperts(_Views):
    """Experts that a backend of ours runs; see `contract.ExpertWeights`."""

    def __init__(self, module: nn.Module, variant: Variant, experts_implementation: str):
        super().__init__(module, variant)
        self.experts_implementation = ALL_EXPERTS_FUNCTIONS.check(experts_implementation)
        self.gate_up_proj_form: Form | None = variant.form
        self.down_proj_form: Form | None = variant.form

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return eager_experts(self, hidden_states, top_k_index, top_k_weights)

    @property
    def activation(self) -> Activation:
        if self.variant.activation is None:
            raise BackendError(f"the gate of {type(self.module).__name__} is none of ours")
        return self.variant.activation

    @property
    def gate_up_proj(self) -> Tensor:
        return self.oriented(self.module.gate_up_proj)

    @property
    def gate_up_proj_bias(self) -> Tensor | None:
        return self.module.gate_up_proj_bias if self.variant.has_bias else None

    @property
    def gate_up_proj_scale(self) -> Tensor | None:
        return self.module.gate_up_proj_scale_inv if self.variant.form else None

    @property
    def down_proj_scale(self) -> Tensor | None:
        return self.module.down_proj_scale_inv if self.variant.form else None


class ComposedExperts(_Views):
    """Experts with steps of their own between two grouped matrix products: any gate, any layout, any norm."""

    def __init__(self, module: nn.Module, variant: Variant, reasons: list[str]):
        super().__init__(module, variant)
        logger.info("experts: %s in its own steps, as it has %s", type(module).__name__, "; ".join(reasons))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """BackendError: grouped products cannot run here."""
        _refuse_obstacles(self.module, self.down_proj, hidden_states.device.type)
        order = sort_by_expert(self, top_k_index)  # pyright: ignore[reportArgumentType]: it reads num_experts alone
        states = hidden_states.to(self.down_proj.dtype)
        rows = self._by_expert(_spread(states, order), GroupedProducts(order.offsets))
        weights = top_k_weights.where(owned_slots(self, top_k_index), 0)  # pyright: ignore[reportArgumentType]
        return weighted_sum(order.slots(rows), weights, hidden_states.dtype)

    def _by_expert(self, rows: Tensor, products: GroupedProducts) -> Tensor:
        """rows [S, H] -> [S, H]; what stands in rows of no expert is finite, and meets a weight of zero."""
        module, gated = self.module, self.variant.has_gate
        up_proj = module.gate_up_proj if gated else module.up_proj
        hidden = _linear(rows, self.oriented(up_proj), self._up_bias(), products)
        hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)
        outputs = _linear(hidden, self.down_proj, self.down_proj_bias, products)
        return module.post_expert_norm(outputs) if self.variant.has_post_expert_norm else outputs

    def _up_bias(self) -> Tensor | None:
        if not self.variant.has_bias:
            return None
        return self.module.gate_up_proj_bias if self.variant.has_gate else self.module.up_proj_bias


def _refuse_obstacles(module: nn.Module, down_proj: Tensor, device_type: str) -> None:
    _, hidden_size, intermediate_size = down_proj.shape
    obstacles = backend_obstacles("grouped_mm", Situation(device_type, down_proj.dtype, hidden_size, intermediate_size))
    if obstacles:
        name = type(module).__name__
        raise BackendError(
            f"{name} needs grouped products, which cannot run here",
            faults=[Fault(name, "cannot run", obstacle) for obstacle in obstacles],
            advice="take one of transformers' own experts implementations",
        )


def _spread(states: Tensor, order: ExpertOrder) -> Tensor:
    """[T, H] -> [S, H] in the experts' order, by a permutation of all slots, whose gradient needs no atomics."""
    slots = states.unsqueeze(1).expand(-1, order.top_k, -1).flatten(0, 1)
    return slots.index_select(0, order.order)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, products: GroupedProducts) -> Tensor:
    """rows [S, in], weight [E, out, in], bias [E, out] -> [S, out]."""
    columns: Tensor = _GroupedLinear.apply(rows, weight, products)  # pyright: ignore[reportAssignmentType]
    if bias is None:
        return columns
    # in float32, in which the bias's gradient is then added up
    return (columns.float() + products.of_rows(bias.float(), len(rows))).to(columns.dtype)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, products: GroupedProducts) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.products = products
        return products.times_transposed(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows, weight), grad = ctx.saved_tensors, grads[0].contiguous()
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return (
            ctx.products.times(grad, weight) if needs_rows else None,
            ctx.products.outer(grad, rows) if needs_weight else None,
            None,
        )
