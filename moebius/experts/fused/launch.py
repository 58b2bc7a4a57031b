"""The fused backend as torch sees it: operators with a backward, so that torch.compile and CUDA graphs meet one opaque
node each way.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

from typing import Any

import torch
from torch import Tensor

from moebius.experts.contract import ExpertWeights
from moebius.experts.fused.decode import decode_experts, decode_serves
from moebius.experts.fused.layer import layer_of, spelled, tensors_of
from moebius.experts.fused.passes import Saved, Wanted, backward_pass, forward_pass

INPUTS = """Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,
Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor? gate_up_proj_scale, Tensor? down_proj_scale, str spelling"""

KEPT = "Tensor z, Tensor order, Tensor inverse, Tensor offsets"


def fused_experts(
    experts: ExpertWeights,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """See `contract.ExpertsFunction`.  No host sync; a CUDA graph can capture it, and its backward, at a fixed T.

    Differentiable once: a second derivative raises.  Kept for the backward: the inputs, 2 S I numbers in the states'
    dtype and 2 S int32; with recompute the 2 S I are not, and the backward multiplies by gate_up_proj once more.
    Weights in quantized forms get no gradient.
    """
    inputs = hidden_states, top_k_index, top_k_weights, *tensors_of(experts)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _training(*inputs, spelled(experts), recompute)[0]
    run = _inference if torch.compiler.is_compiling() else _infer  # an operator costs 60 us more than a call
    return run(*inputs, spelled(experts))


def _infer(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *described: Any) -> Tensor:
    layer, (tokens, top_k) = layer_of(*described), top_k_index.shape
    if not tokens:
        return _like(hidden_states)
    if decode_serves(layer.num_routed, tokens, top_k):
        return decode_experts(layer, hidden_states, top_k_index, top_k_weights)
    with torch.cuda.device_of(hidden_states):
        return forward_pass(layer, hidden_states, top_k_index, top_k_weights, save_z=False).output


def _train(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """output [T, H]; z [S, 2I], or [0, 2I] if it is to be recomputed; the routing's order, inverse [S], offsets."""
    *described, recompute = inputs
    layer = layer_of(*described)
    if not len(top_k_index):
        return tuple(torch.zeros_like(part) for part in _train_fake(hidden_states, top_k_index, None, *described, True))
    with torch.cuda.device_of(hidden_states):
        output, z, routing = forward_pass(layer, hidden_states, top_k_index, top_k_weights, save_z=not recompute)
    kept = _z_like(hidden_states, layer.gate_up_proj, 0) if z is None else z
    return output, kept, routing.order, routing.inverse, routing.offsets


def _train_fake(hidden_states: Tensor, top_k_index: Tensor, _: Any, *inputs: Any) -> tuple[Tensor, ...]:
    *described, recompute = inputs
    gate_up_proj, rows = described[0], top_k_index.numel()
    sizes = rows, rows, gate_up_proj.shape[0] + 1
    integers = (top_k_index.new_empty(size, dtype=torch.int32) for size in sizes)
    return _like(hidden_states), _z_like(hidden_states, gate_up_proj, 0 if recompute else rows), *integers


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _z_like(hidden_states: Tensor, gate_up_proj: Tensor, rows: int) -> Tensor:
    return hidden_states.new_empty(rows, gate_up_proj.shape[1])


def _differentiate(
    grad: Tensor, z: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor,
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *inputs: Any,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, in Wanted's order."""
    *described, wanted = inputs
    layer, tokens = layer_of(*described), len(grad)
    if not tokens:
        return [tensor.zero_() for tensor in _wanted_like(hidden_states, top_k_weights, *described, wanted)]
    saved_z = z if len(z) else None
    saved = Saved(hidden_states, top_k_index, top_k_weights, saved_z, order, inverse, offsets)
    with torch.cuda.device_of(hidden_states):
        return backward_pass(layer, saved, grad, Wanted(*wanted))


def _differentiate_fake(grad: Tensor, *others: Any) -> list[Tensor]:
    hidden_states, _, *weights_and_layer = others[4:]
    return _wanted_like(hidden_states, *weights_and_layer)


def _wanted_like(hidden_states: Tensor, top_k_weights: Tensor, *described: Any) -> list[Tensor]:
    """Uninitialised gradients of those that are wanted."""
    *layer, _, wanted = described
    return [_like(tensor) for tensor, want in zip((hidden_states, top_k_weights, *layer), wanted, strict=False) if want]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, spelling, _ = inputs
    _, *kept = output
    ctx.spelling = spelling
    ctx.set_materialize_grads(False)  # the gradient of z would be as large as z
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*kept, *tensors)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    states, _, weights, *layer, _, _ = ctx.needs_input_grad
    wanted = [states, weights, *layer[:4]]
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    found = iter(_gradients(grad, *ctx.saved_tensors, ctx.spelling, wanted))
    of_states, of_weights, *of_layer = (next(found) if want else None for want in wanted)
    return of_states, None, of_weights, *of_layer, None, None, None, None


_inference = torch.library.custom_op("moebius::fused_experts", _infer, mutates_args=(), schema=f"({INPUTS}) -> Tensor")
_inference.register_fake(lambda hidden_states, *_: _like(hidden_states))
_training = torch.library.custom_op(
    "moebius::fused_experts_training",
    _train,
    mutates_args=(),
    schema=f"({INPUTS}, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_training.register_fake(_train_fake)
_training.register_autograd(_backward, setup_context=_keep)
_gradients = torch.library.custom_op(
    "moebius::fused_experts_backward",
    _differentiate,
    mutates_args=(),
    schema=f"(Tensor grad, {KEPT}, {INPUTS}, bool[] wanted) -> Tensor[]",
)
_gradients.register_fake(_differentiate_fake)
