"""A model takes weights in quantized forms where it can, refuses where it cannot, and computes the same numbers.

B batch, T tokens.
"""

import pytest
import torch
from torch import nn

from moebius.config import (
    DecoderConfig,
    DenseMlp,
    GroupedQueryAttention,
    LayerConfig,
    RmsNorm,
    Rope,
    SharedExpert,
    SoftmaxTopK,
    SparseMoe,
)
from moebius.errors import ArgumentError
from moebius.experts.contract import SEGMENTS
from moebius.layers.decoder import Decoder
from moebius.layers.quantized import QuantizedLinear, can_hold, hold
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8, Form, Mxfp4, PackedInt4

FORMS = [Mxfp4(), BlockFp8((48, 40)), PackedInt4()]
HIDDEN = 64


def decoder_config(*, tied: bool = False) -> DecoderConfig:
    attention = GroupedQueryAttention(4, 2, 16, Rope(10000.0, 16), qkv_bias=True)
    moe = SparseMoe(4, 2, 32, SoftmaxTopK(renormalize=True), shared_expert=SharedExpert(96, gated=True))
    layers = LayerConfig(attention, moe), LayerConfig(attention, DenseMlp(128))
    return DecoderConfig("", 128, HIDDEN, 64, layers, RmsNorm(1e-6), tie_word_embeddings=tied)


def linear_and_quantized(form: Form, *, bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, QuantizedLinear]:
    """Two layers of the same numbers: decoded, and in the form."""
    linear = nn.Linear(96, 80, bias=bias).to(dtype)
    values, scales = quantize(form, linear.weight.detach())
    quantized = QuantizedLinear(linear, form)
    with torch.no_grad():
        quantized.weight.copy_(values)
        quantized.weight_scale.copy_(scales)
        linear.weight.copy_(dequantize(form, values, scales, dtype))
    return linear, quantized


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_quantized_linear_is_a_linear_with_the_decoded_weight(form, bias, dtype):
    linear, quantized = linear_and_quantized(form, bias=bias, dtype=dtype)
    states = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    output, expected = quantized(states), linear(states)
    assert torch.equal(output, expected)
    assert torch.equal(quantized.plain_weight(dtype), linear.weight)
    leaves = [states, *([linear.bias] if bias else [])]
    grad = torch.randn_like(output)
    for found, wanted in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_the_decoded_weight_does_not_wait_for_the_backward():
    _, quantized = linear_and_quantized(Mxfp4(), bias=True, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        quantized(torch.randn(3, 96, requires_grad=True))
    assert {tensor.data_ptr() for tensor in saved} == {quantized.weight.data_ptr(), quantized.weight_scale.data_ptr()}


def test_a_cast_takes_the_bias_and_leaves_the_weight():
    _, quantized = linear_and_quantized(BlockFp8(), bias=True, dtype=torch.float32)
    before = quantized.plain_weight(torch.float32)
    nn.Sequential(quantized).to(torch.bfloat16)
    assert [tensor.dtype for tensor in quantized.parameters()] == [
        torch.float8_e4m3fn,
        torch.float32,
        torch.bfloat16,
    ]
    assert torch.equal(quantized.plain_weight(torch.float32), before)
    assert quantized(torch.randn(3, 96).bfloat16()).dtype == torch.bfloat16


def test_under_autocast_it_computes_as_a_linear_does():
    linear, quantized = linear_and_quantized(BlockFp8(), bias=True, dtype=torch.float32)
    states = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = quantized(states), linear(states)
    assert torch.equal(output, expected)
    (found,), (wanted,) = (torch.autograd.grad(each.float().sum(), states) for each in (output, expected))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


HELD = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj",
    "model.layers.0.mlp.shared_expert.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "lm_head.weight",
]
PLAIN = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.self_attn.q_proj.bias",
]


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_model_with_held_weights_gives_the_logits_of_the_decoded_ones(form):
    plain, held = Decoder(decoder_config()), Decoder(decoder_config())
    plain.init_weights(torch.Generator().manual_seed(0))
    held.load_state_dict(plain.state_dict())
    packed = {
        name: quantize(form, plain.get_parameter(name).detach(), SEGMENTS.get(name.split(".")[-1], 1)) for name in HELD
    }
    hold(held, dict.fromkeys(HELD, form))
    with torch.no_grad():
        for name, (values, scales) in packed.items():
            segments = SEGMENTS.get(name.split(".")[-1], 1)
            plain.get_parameter(name).copy_(dequantize(form, values, scales, torch.float32, segments))
            held.get_parameter(name).copy_(values)
            held.get_parameter(f"{name}_scale").copy_(scales)
    plain.set_experts_implementation("eager")
    tokens = torch.randint(0, 128, (2, 7))
    assert torch.equal(held(tokens).logits, plain(tokens).logits)
    held(tokens, labels=tokens).loss.backward()
    assert all(held.get_parameter(name).grad is None for name in HELD)
    assert held.model.embed_tokens.weight.grad.ne(0).any()


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_unfreezing_a_model_leaves_held_weights_without_gradient(form):
    model = Decoder(decoder_config())
    model.init_weights(torch.Generator().manual_seed(0))
    hold(model, dict.fromkeys(HELD, form))
    held = {f"{name}{end}" for name in HELD for end in ("", "_scale")}
    with torch.no_grad():
        for name in held:
            model.get_parameter(name).zero_()
    model.requires_grad_(True)
    tokens = torch.randint(0, 128, (2, 7))
    model(tokens, labels=tokens).loss.backward()
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == held
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} >= held


def test_whether_a_weight_can_be_held_is_looked_up_and_not_searched_for(monkeypatch):
    """The names of a large model's parameters, many thousands, are listed once for all of its weights."""
    with torch.device("meta"):
        model = Decoder(decoder_config())
    listed = []
    list_names = Decoder.named_parameters
    monkeypatch.setattr(Decoder, "named_parameters", lambda *given, **o: listed.append(1) or list_names(*given, **o))
    hold(model, dict.fromkeys(HELD, Mxfp4()))
    assert len(listed) == 1


def test_which_weights_can_be_held():
    with torch.device("meta"):
        model = Decoder(decoder_config())
    assert [name for name in HELD if not can_hold(model, name)] == []
    assert [name for name in PLAIN if can_hold(model, name)] == []
    assert not can_hold(model, "model.layers.9.self_attn.q_proj.weight")


def test_a_tied_head_cannot_be_held():
    with torch.device("meta"):
        model = Decoder(decoder_config(tied=True))
    assert not can_hold(model, "lm_head.weight")
    with pytest.raises(ArgumentError, match=r"lm_head\.weight: cannot be held: it is tied to another weight"):
        hold(model, {"lm_head.weight": Mxfp4()})


def test_room_is_made_on_meta_under_the_names_that_scales_go_by():
    with torch.device("meta"):
        model = Decoder(decoder_config())
    before, roles = set(model.state_dict()), model.parameter_roles()
    hold(model, dict.fromkeys(HELD, PackedInt4()))
    assert set(model.state_dict()) == before | {f"{name}_scale" for name in HELD}
    assert all(model.get_parameter(name).dtype == torch.int32 for name in HELD)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    held_roles = model.parameter_roles()
    assert all(held_roles[name] == held_roles[f"{name}_scale"] == roles[name] for name in HELD)


def test_all_that_cannot_be_held_is_named_at_once_and_nothing_is_changed():
    with torch.device("meta"):
        model = Decoder(decoder_config())
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wrong = [*PLAIN, "model.layers.0.mlp.experts.up_proj", "model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ArgumentError) as raised:
        hold(model, dict.fromkeys(HELD, Mxfp4()) | dict.fromkeys(wrong, PackedInt4(group_size=48)))
    assert [fault.where for fault in raised.value.faults] == wrong
    said = {fault.where: str(fault) for fault in raised.value.faults}
    assert "this is the weight of Embedding" in said["model.embed_tokens.weight"]
    assert "no such parameter" in said["model.layers.0.mlp.experts.up_proj"]
    assert "groups of 48; 64 is no multiple" in said["model.layers.1.mlp.up_proj.weight"]
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before


def test_a_weight_is_held_once():
    with torch.device("meta"):
        model = Decoder(decoder_config())
    hold(model, dict.fromkeys(HELD, Mxfp4()))
    assert not any(can_hold(model, name) for name in HELD)
    with pytest.raises(ArgumentError) as raised:
        hold(model, dict.fromkeys(HELD, BlockFp8()))
    assert [fault.detail for fault in raised.value.faults] == ["it is already"] * len(HELD)
