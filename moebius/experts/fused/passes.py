"""A layer's forward and backward over sorted rows, put together from the products.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows; "sorted" is a Routing's order.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.experts.fused import backward
from moebius.experts.fused.backward_tiles import backward_tiles
from moebius.experts.fused.forward import combine, down, gate_up
from moebius.experts.fused.layer import Layer, Projection
from moebius.experts.fused.quantized import (
    decoded,
    decodes_first,
    quantized_down,
    quantized_gate_up,
    quantized_input_gradient,
    quantized_tiles,
)
from moebius.experts.fused.routing import Routing, route, tiled
from moebius.experts.fused.tuning import ForwardTiles, TileConfig, forward_tiles

INTERPRETED_CAPABILITY = (9, 0)


class Pass(NamedTuple):
    """output [T, H]; z [S, 2I], sorted, None if not saved."""

    output: Tensor
    z: Tensor | None
    routing: Routing


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden_states: bool
    top_k_weights: bool
    gate_up_proj: bool
    down_proj: bool
    gate_up_proj_bias: bool
    down_proj_bias: bool


@dataclass(frozen=True)
class Saved:
    """What a backward starts from.  z [S, 2I], sorted, or None: to be made again.  The last three are a Routing's."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    z: Tensor | None
    order: Tensor
    inverse: Tensor
    offsets: Tensor

    def routing(self, block_m: int) -> Routing:
        return tiled(self.order, self.inverse, self.offsets, self.top_k_index.shape[1], block_m)


def forward_pass(
    layer: Layer, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, save_z: bool
) -> Pass:  # fmt: skip
    """T > 0.  Tensors of any strides."""
    tiles = _forward_tiles(layer, top_k_index.numel(), hidden_states)
    routing = route(top_k_index, layer.num_experts, tiles.block_m)
    a, z = _gate_up(layer, hidden_states.contiguous(), routing, tiles.gate_up, save_z)
    return Pass(combine(_down(layer, a, routing, tiles.down), top_k_weights, routing), z, routing)


def backward_pass(layer: Layer, saved: Saved, grad: Tensor, wanted: Wanted) -> list[Tensor]:
    """grad [T, H] -> the gradients that are wanted, in Wanted's order.  T > 0."""
    grad, rows = grad.contiguous(), saved.top_k_index.numel()
    tiles = backward_tiles(_capability(grad.device), rows / layer.num_experts)
    routing, slot_weights = saved.routing(tiles.block_m), saved.top_k_weights.flatten().float()
    of_z = _z_gradient(layer, saved, grad, slot_weights, routing, tiles.z_gradient, wanted.down_proj)
    by_size = backward.largest_first(routing)
    found = []
    if wanted.hidden_states:
        rows_grad = _rows_gradient(layer, of_z.z_grad, routing, tiles.rows_gradient)
        found.append(backward.hidden_states_gradient(rows_grad, routing))
    if wanted.top_k_weights:
        index, dtype = saved.top_k_index.contiguous(), saved.top_k_weights.dtype
        found.append(backward.slot_weights_gradient(of_z.parts, grad, layer.down_proj_bias, index, routing, dtype))
    if wanted.gate_up_proj:
        states = saved.hidden_states.contiguous()
        found.append(backward.gate_up_proj_gradient(of_z.z_grad, states, routing, by_size, tiles.weight_gradient))
    if of_z.scaled is not None:
        found.append(backward.down_proj_gradient(grad, of_z.scaled, routing, by_size, tiles.weight_gradient))
    if wanted.gate_up_proj_bias:
        found.append(backward.bias_gradient(of_z.z_grad, routing))
    if wanted.down_proj_bias:
        found.append(backward.bias_gradient(grad, routing, slot_weights))
    return found


def _gate_up(
    layer: Layer, states: Tensor, routing: Routing, config: TileConfig, save_z: bool
) -> tuple[Tensor, Tensor | None]:
    held = _ready(layer.gate_up, routing, states.dtype)
    if held.form is None or held.scales is None:
        return gate_up(states, held.weight, held.bias, routing, config, layer.activation, save_z)
    return quantized_gate_up(
        states, held.weight, held.form, held.scales, held.bias, routing, config, layer.activation, save_z
    )


def _down(layer: Layer, a: Tensor, routing: Routing, config: TileConfig) -> Tensor:
    held = _ready(layer.down, routing, a.dtype)
    if held.form is None or held.scales is None:
        return down(a, held.weight, held.bias, routing, config)
    return quantized_down(a, held.weight, held.form, held.scales, held.bias, routing, config)


def _z_gradient(
    layer: Layer, saved: Saved, grad: Tensor, slot_weights: Tensor, routing: Routing, config: TileConfig, scaled: bool
) -> backward.ZGradient:
    z = _recomputed_z(layer, saved) if saved.z is None else saved.z
    held, activation = _ready(layer.down, routing, grad.dtype), layer.activation
    if held.form is None or held.scales is None:
        return backward.z_gradient(grad, z, held.weight, slot_weights, routing, activation, config, save_scaled=scaled)
    by_row = grad.index_select(0, routing.order // routing.top_k)
    projected = quantized_input_gradient(by_row, held.name, held.weight, held.form, held.scales, routing.offsets)
    return backward.z_gradient_of(projected, z, slot_weights, routing, activation, save_scaled=scaled)


def _rows_gradient(layer: Layer, z_grad: Tensor, routing: Routing, config: TileConfig) -> Tensor:
    held = _ready(layer.gate_up, routing, z_grad.dtype)
    if held.form is None or held.scales is None:
        return backward.rows_gradient(z_grad, held.weight, routing, config)
    return quantized_input_gradient(z_grad, held.name, held.weight, held.form, held.scales, routing.offsets)


def _recomputed_z(layer: Layer, saved: Saved) -> Tensor:
    tiles = _forward_tiles(layer, saved.top_k_index.numel(), saved.hidden_states)
    _, z = _gate_up(layer, saved.hidden_states.contiguous(), saved.routing(tiles.block_m), tiles.gate_up, True)
    assert z is not None
    return z


def _ready(projection: Projection, routing: Routing, dtype: torch.dtype) -> Projection:
    """As its product takes it: decoded, where that is better done once; it stands so for that product alone."""
    if projection.form is None or projection.scales is None or _stays_held(projection, routing.rows_per_expert, dtype):
        return projection
    weight = decoded(projection.name, projection.weight, projection.form, projection.scales, dtype)
    return replace(projection, weight=weight, form=None, scales=None)


def _stays_held(projection: Projection, rows_per_expert: float, dtype: torch.dtype) -> bool:
    return projection.form is not None and not decodes_first(rows_per_expert, projection.num_weights, dtype)


def _forward_tiles(layer: Layer, rows: int, states: Tensor) -> ForwardTiles:
    """Where one projection stays in its form, and one is plain, the plain one takes the height of the other's tiles."""
    rows_per_expert = rows / layer.num_experts
    stay = [_stays_held(projection, rows_per_expert, states.dtype) for projection in (layer.gate_up, layer.down)]
    of_forms = quantized_tiles(rows_per_expert)
    if all(stay):
        return of_forms
    _, hidden_size, width = layer.down.shape
    plain = forward_tiles(
        _capability(states.device), hidden_size, width, rows_per_expert, of_forms.block_m if any(stay) else None
    )
    return ForwardTiles(of_forms.gate_up if stay[0] else plain.gate_up, of_forms.down if stay[1] else plain.down)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED_CAPABILITY
