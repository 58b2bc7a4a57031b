"""The forward pass over rows sorted by expert: gate and up with the activation, down, and the weighted sum.

Each function queues one kernel on the current stream; `forward_kernels` says what they compute.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

import math

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moebius.config import Activation
from moebius.errors import ArgumentError, Fault
from moebius.experts.fused.forward_kernels import combine_kernel, down_kernel, gate_up_kernel
from moebius.experts.fused.operands import (
    activation_kind,
    activation_numbers,
    blocks,
    boxes,
    overlapping,
    programs,
)
from moebius.experts.fused.routing import Routing
from moebius.experts.fused.tuning import TileConfig


def gate_up(
    x: Tensor,
    gate_up_proj: Tensor,
    bias: Tensor | None,
    routing: Routing,
    config: TileConfig,
    activation: Activation,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x [T, H], gate_up_proj [E, 2I, H], bias [E, 2I], all contiguous -> a [S, I] = act(z) in the sorted order, and
    z [S, 2I] = x W1^T + b1 if save_z, in x's dtype.  Rows of foreign experts are not written.

    routing: over tiles of config.block_m rows.  T > 0.
    """
    _check(routing, config, x=x, gate_up_proj=gate_up_proj, gate_up_proj_bias=bias)
    num_experts, hidden_size, width = len(gate_up_proj), gate_up_proj.shape[2], gate_up_proj.shape[1] // 2
    a = x.new_empty(routing.rows, width)
    z = x.new_empty(routing.rows, 2 * width) if save_z else None
    parts = 1 if config.swapped else 2
    weight = boxes(gate_up_proj.view(num_experts, 2, width, hidden_size), [1, parts, config.block_n, config.block_k])
    gate_up_kernel[(routing.max_tiles * math.ceil(width / config.block_n),)](
        x, weight, bias, a, z, routing.order, *routing.tiles, *activation_numbers(activation),
        H=hidden_size, I=width, TOP_K=routing.top_k, ACTIVATION=activation_kind(activation),
        HAS_BIAS=bias is not None, SAVE_Z=save_z, W_TMA=isinstance(weight, TensorDescriptor),
        SWAPPED=config.swapped, **blocks(config), **overlapping(x.device, routing),
    )  # fmt: skip
    return a, z


def down(a: Tensor, down_proj: Tensor, bias: Tensor | None, routing: Routing, config: TileConfig) -> Tensor:
    """a [S, I], down_proj [E, H, I], bias [E, H], all contiguous -> y [S, H] = a W2^T + b2, in the sorted order.

    Rows of foreign experts are not written.  routing: over tiles of config.block_m rows.  S > 0.
    """
    _check(routing, config, a=a, down_proj=down_proj, down_proj_bias=bias)
    num_experts, hidden_size, width = down_proj.shape
    y = a.new_empty(routing.rows, hidden_size)
    weight = boxes(down_proj.view(num_experts, 1, hidden_size, width), [1, 1, config.block_n, config.block_k])
    rows = boxes(a, [config.block_m, config.block_k])
    by_tma = isinstance(weight, TensorDescriptor), isinstance(rows, TensorDescriptor)
    down_kernel[(programs(config, a.device, routing.max_tiles * math.ceil(hidden_size / config.block_n)),)](
        rows, weight, bias, y, *routing.tiles, H=hidden_size, I=width, HAS_BIAS=bias is not None,
        W_TMA=by_tma[0], X_TMA=by_tma[1], FLAT=config.schedule == "flat" and all(by_tma),
        SWAPPED=config.swapped, **blocks(config), **overlapping(a.device, routing),
    )  # fmt: skip
    return y


def combine(y: Tensor, top_k_weights: Tensor, routing: Routing) -> Tensor:
    """y [S, H] in the sorted order, top_k_weights [T, K] of any strides and dtype -> [T, H] in y's dtype.

    A token's rows times their weights, added in float32 in slot order and rounded once; foreign slots are not read.
    """
    tokens, hidden_size = routing.rows // routing.top_k, y.shape[1]
    out = y.new_empty(tokens, hidden_size)
    block = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(tokens, math.ceil(hidden_size / block))](
        y, top_k_weights, routing.inverse, routing.offsets, out, *top_k_weights.stride(), routing.num_experts,
        H=hidden_size, TOP_K=routing.top_k, BLOCK_H=block, num_warps=4, **overlapping(y.device, routing),
    )  # fmt: skip
    return out


def _check(routing: Routing, config: TileConfig, **operands: Tensor | None) -> None:
    faults = [
        Fault(name, "not contiguous", f"strides {tuple(tensor.stride())}")
        for name, tensor in operands.items()
        if tensor is not None and not tensor.is_contiguous()
    ]
    if config.block_m != routing.block_m:
        faults.append(Fault("config.block_m", "not the routing's", f"{config.block_m}, but {routing.block_m}"))
    if faults:
        raise ArgumentError("the experts' product cannot run", faults=faults)
