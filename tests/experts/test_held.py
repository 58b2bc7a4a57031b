"""Experts held in a quantized form give what plain experts with the decoded weights give, and keep nothing decoded."""

import logging
import re

import pytest
import torch

from moebius.config import ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.errors import ArgumentError, BackendError
from moebius.experts import interface
from moebius.experts.interface import Experts
from moebius.quantization import held
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8, Form, Mxfp4, PackedInt4

HIDDEN, WIDTH, EXPERTS, TOP_K = 96, 64, 6, 2
FORMS = [Mxfp4(), BlockFp8((48, 40)), PackedInt4()]  # 64 rows of gate: a block and a third, then up's begin
SEGMENTS = {"gate_up_proj": 2, "down_proj": 1}
CONFIG = SparseMoe(EXPERTS, TOP_K, WIDTH, SoftmaxTopK(renormalize=True))


def plain_and_held(form: Form, config: SparseMoe = CONFIG, names=tuple(SEGMENTS)) -> tuple[Experts, Experts]:
    """Two layers of the same numbers: decoded, and in the form."""
    plain, packed = Experts(config, HIDDEN), Experts(config, HIDDEN)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
            packed.get_parameter(name).copy_(parameter)
        for name in names:
            values, scales = quantize(form, plain.get_parameter(name), SEGMENTS[name])
            plain.get_parameter(name).copy_(dequantize(form, values, scales, torch.float32, SEGMENTS[name]))
            packed.hold(name, form)
            packed.get_parameter(name).copy_(values)
            packed.get_parameter(f"{name}_scale").copy_(scales)
    return plain, packed


def inputs(tokens: int = 17, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices if tokens else torch.empty(0, TOP_K, dtype=torch.int64)
    return torch.randn(tokens, HIDDEN).to(dtype), index, torch.rand(tokens, TOP_K)


def run(experts: Experts, hidden_states, index, weights, biases: bool) -> dict[str, torch.Tensor]:
    """Output and gradients, by the backend that the experts name."""
    states, scores = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(states, index, scores)
    leaves = {"hidden_states": states, "top_k_weights": scores}
    if biases:
        leaves |= {name: tensor for name, tensor in experts.named_parameters() if name.endswith("bias")}
    grads = torch.autograd.grad(output.sin().sum(), list(leaves.values()))
    return {"output": output, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation", [SwiGLU(), ClampedSwiGLU(limit=0.7)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_experts_are_plain_experts_with_the_decoded_weights(form, bias, activation, names, dtype):
    config = SparseMoe(EXPERTS, TOP_K, WIDTH, SoftmaxTopK(renormalize=True), activation, bias=bias)
    plain, packed = (experts.to(dtype) for experts in plain_and_held(form, config, names))
    plain.set_experts_implementation("eager")
    tensors = inputs(dtype=dtype)
    expected, found = run(plain, *tensors, bias), run(packed, *tensors, bias)
    assert expected.keys() == found.keys()
    for what, value in expected.items():
        assert torch.equal(found[what], value), what


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_foreign_slots(form, tokens):
    plain, packed = plain_and_held(form)
    plain.set_experts_implementation("eager")
    states, index, weights = inputs(tokens)
    index[:, 1] = -1
    expected, found = run(plain, states, index, weights, False), run(packed, states, index, weights, False)
    assert all(torch.equal(found[what], value) for what, value in expected.items())


def test_only_experts_that_were_hit_are_decoded_one_projection_at_a_time(monkeypatch):
    _, packed = plain_and_held(Mxfp4())
    decoded = []

    def counting(form, values, *args):
        decoded.append(form.weight_shape(values.shape))
        return dequantize(form, values, *args)

    monkeypatch.setattr(held, "dequantize", counting)
    states, _, weights = inputs(3)
    packed.set_experts_implementation("eager")
    packed(states, torch.tensor([[0, 4], [4, 0], [0, 4]]), weights)
    assert decoded == [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)] * 2


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_nothing_decoded_waits_for_the_backward(form):
    _, packed = plain_and_held(form)
    saved = []
    states, index, weights = inputs(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        packed(states.requires_grad_(), index, weights)
    own = {tensor.untyped_storage().data_ptr() for tensor in packed.parameters()}
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert len(others) < len(saved)
    assert max(tensor.numel() for tensor in others) < HIDDEN * WIDTH


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_a_backend_that_takes_plain_weights_says_so_when_it_is_named(name):
    _, packed = plain_and_held(BlockFp8())
    packed.set_experts_implementation(name)
    with pytest.raises(BackendError, match=rf"{name}: cannot run: weights held as fp8_block \(it takes plain ones\)"):
        packed(*inputs())


@pytest.mark.parametrize(("needs_grad", "name"), [(True, "eager"), (False, "cpu")])
def test_auto_says_what_it_takes_and_why(caplog, needs_grad, name):
    _, packed = plain_and_held(PackedInt4())
    interface._chosen.cache_clear()
    states, index, weights = inputs()
    with caplog.at_level(logging.INFO, "moebius.experts"):
        packed(states.requires_grad_(needs_grad), index, weights)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"experts: {name}, ")
    assert ("cpu cannot run: gradients" if needs_grad else "runs on cpu in int4_pack") in message


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_cast_leaves_what_is_packed_alone_and_takes_the_biases(form):
    config = SparseMoe(EXPERTS, TOP_K, WIDTH, SoftmaxTopK(renormalize=True), bias=True)
    _, packed = plain_and_held(form, config)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.half()
    for name, tensor in packed.state_dict().items():
        assert tensor.dtype == (torch.float16 if name.endswith("bias") else before[name].dtype)
        assert torch.equal(tensor.float(), before[name].to(tensor.dtype).float())


def test_states_keep_their_dtype_where_all_is_packed():
    _, packed = plain_and_held(BlockFp8())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert packed(*inputs(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("form", [*FORMS, BlockFp8(scale_dtype="float8_e8m0fnu")], ids=repr)
def test_room_is_made_in_the_layout_of_the_form_on_any_device(form):
    with torch.device("meta"):
        experts = Experts(CONFIG, HIDDEN)
    for name, segments in SEGMENTS.items():
        shape = tuple(experts.get_parameter(name).shape)
        experts.hold(name, form)
        tensors = experts.get_parameter(name), experts.get_parameter(f"{name}_scale")
        for tensor, spec in zip(tensors, (form.values(shape), form.scales(shape, segments)), strict=True):
            assert (tuple(tensor.shape), str(tensor.dtype)) == (spec.shape, f"torch.{spec.dtype}")
            assert tensor.device.type == "meta"
            assert not tensor.requires_grad
    assert set(experts.state_dict()) == {"gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"}


def test_a_projection_is_held_once_and_only_in_a_form_that_fits():
    experts = Experts(CONFIG, HIDDEN)
    experts.hold("down_proj", Mxfp4())
    with pytest.raises(ArgumentError, match="down_proj is held as Mxfp4"):
        experts.hold("down_proj", BlockFp8())
    with pytest.raises(ArgumentError, match=re.escape("[6, 128, 96]: int4_pack takes inputs in groups of 64; 96")):
        experts.hold("gate_up_proj", PackedInt4(group_size=64))
