"""The backward pass, product by product; backward_kernels has the algebra.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows; "sorted" is a Routing's order.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moebius.config import Activation
from moebius.experts.activations import gated_activation_gradient
from moebius.experts.fused import backward_kernels as kernels
from moebius.experts.fused.forward import combine
from moebius.experts.fused.operands import activation_kind, activation_numbers, blocks, boxes
from moebius.experts.fused.routing import Routing
from moebius.experts.fused.tuning import TileConfig


class ZGradient(NamedTuple):
    """z_grad [S, 2I] and scaled [S, I], the activation times its slot's weight, are sorted.

    parts [S, blocks] float32, sorted: from each block of columns, a part of the gradient of the slot's weight.
    """

    z_grad: Tensor
    scaled: Tensor | None
    parts: Tensor


def z_gradient(
    grad: Tensor, z: Tensor, down_proj: Tensor, slot_weights: Tensor, routing: Routing, activation: Activation,
    config: TileConfig, *, save_scaled: bool,
) -> ZGradient:  # fmt: skip
    """grad [T, H], z [S, 2I] sorted, down_proj [E, H, I], slot_weights [S] float32 by slot; routing: over
    tiles of config.block_m rows.

    `scaled` is what down_proj's gradient takes; None unless asked for.  Rows that no expert owns are not written.
    """
    _, hidden_size, width = down_proj.shape
    columns = math.ceil(width / config.block_n)
    z_grad, parts = torch.empty_like(z), torch.empty(len(z), columns, dtype=torch.float32, device=z.device)
    scaled = z.new_empty(len(z), width) if save_scaled else None
    weight = boxes(down_proj, [1, config.block_k, config.block_n])
    kernels.z_gradient_kernel[(routing.max_tiles * columns,)](
        grad, weight, z, slot_weights, routing.order, *routing.tiles, z_grad, scaled, parts,
        *activation_numbers(activation), H=hidden_size, I=width, TOP_K=routing.top_k,
        ACTIVATION=activation_kind(activation), SAVE_SCALED=save_scaled, W_TMA=isinstance(weight, TensorDescriptor),
        **blocks(config),
    )  # fmt: skip
    return ZGradient(z_grad, scaled, parts)


def z_gradient_of(
    projected: Tensor, z: Tensor, slot_weights: Tensor, routing: Routing, activation: Activation, *, save_scaled: bool
) -> ZGradient:
    """The same from projected [S, I], sorted: grad times down_proj, made by somebody else.  Plain torch, in float32."""
    projected, weights = projected.float(), slot_weights[routing.order].unsqueeze(-1)
    activated, z_grad = gated_activation_gradient(activation, z.float(), projected * weights)
    parts = (projected * activated).sum(dim=1, keepdim=True)
    return ZGradient(z_grad.to(z.dtype), (activated * weights).to(z.dtype) if save_scaled else None, parts)


def hidden_states_gradient(rows_grad: Tensor, routing: Routing) -> Tensor:
    """rows_grad [S, H] sorted -> [T, H]: a token's K rows added in float32, rounded once; foreign ones are not read."""
    ones = torch.ones((), dtype=torch.float32, device=rows_grad.device)
    return combine(rows_grad, ones.expand(routing.rows // routing.top_k, routing.top_k), routing)


def rows_gradient(z_grad: Tensor, gate_up_proj: Tensor, routing: Routing, config: TileConfig) -> Tensor:
    """z_grad [S, 2I] times gate_up_proj [E, 2I, H]: [S, H], sorted; rows that no expert owns are not written."""
    _, width, hidden_size = gate_up_proj.shape
    rows_grad = z_grad.new_empty(len(z_grad), hidden_size)
    rows = boxes(z_grad, [config.block_m, config.block_k])
    weight = boxes(gate_up_proj, [1, config.block_k, config.block_n])
    by_tma = isinstance(rows, TensorDescriptor), isinstance(weight, TensorDescriptor)
    kernels.rows_gradient_kernel[(routing.max_tiles * math.ceil(hidden_size / config.block_n),)](
        rows, weight, *routing.tiles, rows_grad,
        C=width, N=hidden_size, X_TMA=by_tma[0], W_TMA=by_tma[1], **blocks(config),
    )  # fmt: skip
    return rows_grad


def down_proj_gradient(
    grad: Tensor, scaled: Tensor, routing: Routing, largest_first: Tensor, config: TileConfig
) -> Tensor:  # fmt: skip
    """grad [T, H], scaled [S, I] sorted, largest_first as from `largest_first` -> [E, H, I]."""
    return weight_gradient(grad, scaled, routing, largest_first, config, left_by_token=True, right_by_token=False)


def gate_up_proj_gradient(
    z_grad: Tensor, hidden_states: Tensor, routing: Routing, largest_first: Tensor, config: TileConfig
) -> Tensor:  # fmt: skip
    """z_grad [S, 2I] sorted, hidden_states [T, H], largest_first as from `largest_first` -> [E, 2I, H]."""
    return weight_gradient(
        z_grad, hidden_states, routing, largest_first, config, left_by_token=False, right_by_token=True
    )  # fmt: skip


def weight_gradient(
    left: Tensor, right: Tensor, routing: Routing, largest_first: Tensor, config: TileConfig, *,
    left_by_token: bool, right_by_token: bool,
) -> Tensor:  # fmt: skip
    """left^T right over each expert's rows, left [S, M] and right [S, N] sorted, or [T, ...] by token -> [E, M, N].

    Zeros for an expert without rows.
    """
    height, width = left.shape[1], right.shape[1]
    weight_grad = left.new_empty(routing.num_experts, height, width)
    out = boxes(weight_grad, [1, config.block_m, config.block_n])
    tiles = math.ceil(height / config.block_m) * math.ceil(width / config.block_n)
    kernels.weight_gradient_kernel[(routing.num_experts * tiles,)](
        left, right, routing.order, routing.offsets, largest_first, out,
        M=height, N=width, TOP_K=routing.top_k, LEFT_BY_TOKEN=left_by_token, RIGHT_BY_TOKEN=right_by_token,
        OUT_TMA=isinstance(out, TensorDescriptor), **blocks(config),
    )  # fmt: skip
    return weight_grad


def largest_first(routing: Routing) -> Tensor:
    """[E] int64: the experts by their number of rows, so that the longest sums do not begin last."""
    return routing.offsets.diff().argsort(descending=True, stable=True)


def bias_gradient(rows: Tensor, routing: Routing, slot_weights: Tensor | None = None) -> Tensor:
    """Each expert's rows added in float32: [E, N].

    rows [S, N] sorted; or [T, N] by token, each to be taken times its slot's weight, slot_weights [S] float32 by slot.
    """
    width, block_n = rows.shape[1], 64
    bias_grad = rows.new_empty(routing.num_experts, width)
    kernels.bias_gradient_kernel[(routing.num_experts, math.ceil(width / block_n))](
        rows, slot_weights, routing.order, routing.offsets, bias_grad,
        N=width, TOP_K=routing.top_k, BY_TOKEN=slot_weights is not None, BLOCK_M=64, BLOCK_N=block_n,
    )  # fmt: skip
    return bias_grad


def slot_weights_gradient(
    parts: Tensor, grad: Tensor, bias: Tensor | None, top_k_index: Tensor, routing: Routing, dtype: torch.dtype
) -> Tensor:
    """parts as in ZGradient, grad [T, H], bias: down_proj's [E, H], top_k_index [T, K] -> [T, K] in dtype; zero for a
    foreign slot.
    """
    slots, blocks, block_s = routing.rows, parts.shape[1], 16
    weights_grad = torch.empty(top_k_index.shape, dtype=dtype, device=grad.device)
    kernels.slot_weights_gradient_kernel[(math.ceil(slots / block_s),)](
        parts, grad, bias, top_k_index, routing.inverse, routing.offsets, weights_grad,
        slots, routing.num_experts, H=grad.shape[1], TOP_K=routing.top_k, PARTS=blocks,
        PARTS_BLOCK=triton.next_power_of_2(blocks), HAS_BIAS=bias is not None, BLOCK_S=block_s, BLOCK_H=128,
    )  # fmt: skip
    return weights_grad
