"""The products over sorted rows with quantized weights give what eager gives, in every form; also backwards.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch

from moebius.config import ClampedSwiGLU, SwiGLU
from moebius.experts.eager import eager_experts
from moebius.experts.fused.forward import combine
from moebius.experts.fused.quantized import (
    decoded,
    decodes_first,
    quantized_down,
    quantized_gate_up,
    quantized_input_gradient,
)
from moebius.experts.fused.routing import Routing, route
from moebius.experts.fused.tuning import TileConfig
from moebius.quantization.decoding import dequantize
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.interpreted.held_layers import EXPERTS, SEGMENTS, held_layer, inputs

# the interpreter's own
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

FORMS = [
    Int8(),
    Int8("bfloat16"),
    BlockFp8((48, 40)),
    BlockFp8(scale_dtype="float8_e8m0fnu"),
    PackedInt4(),
    PackedInt4(8, "float32"),
    PackedInt4(64),
    Mxfp4(),
]
CONFIG = TileConfig(16, 32, 64, 4, 2, group_m=2)


def forward(experts, states, index, weights, config=CONFIG) -> torch.Tensor:
    routing = route(index, EXPERTS, config.block_m)
    form, scales = experts.gate_up_proj_form, (experts.gate_up_proj_scale, experts.down_proj_scale)
    a, _ = quantized_gate_up(
        states, experts.gate_up_proj, form, scales[0], experts.gate_up_proj_bias, routing, config, experts.activation
    )
    return combine(
        quantized_down(a, experts.down_proj, form, scales[1], experts.down_proj_bias, routing, config), weights, routing
    )


def assert_like_eager(experts, *tensors, config=CONFIG) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            forward(experts, *tensors, config), eager_experts(experts, *tensors), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize(("hidden", "width"), [(192, 64), (64, 192)])
def test_every_form_gives_what_eager_gives(form, hidden, width):
    states, index, weights = inputs(20, hidden)
    index[3], index[5, 1] = -1, EXPERTS
    states[3], weights[3] = torch.nan, torch.nan
    assert_like_eager(held_layer(form, hidden, width), states, index, weights)


@pytest.mark.parametrize("form", [Int8(), BlockFp8((48, 40)), PackedInt4(8)], ids=repr)
def test_odd_sizes(form):
    assert_like_eager(held_layer(form, 72, 40), *inputs(17, 72))


@pytest.mark.parametrize("activation", [SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7)], ids=lambda a: type(a).__name__)
def test_biases_and_activations(activation):
    assert_like_eager(held_layer(Mxfp4(), 64, 96, activation=activation, bias=True), *inputs(9, 64))


def test_a_block_of_scales_as_wide_as_the_matrix():
    assert_like_eager(held_layer(Mxfp4(), 32, 32), *inputs(9, 32))


def test_one_hot_expert_of_several_tiles():
    states, index, weights = inputs(40, 64)
    index[:, 0], index[:, 1] = 4, -1
    assert_like_eager(held_layer(PackedInt4(), 64, 64), states, index, weights)


@pytest.mark.parametrize("form", [Int8(), Mxfp4()], ids=repr)
def test_z_is_what_the_activation_is_of(form):
    experts, (states, index, _) = held_layer(form, 64, 96, bias=True), inputs(9, 64)
    routing = route(index, EXPERTS, CONFIG.block_m)
    tensors = experts.gate_up_proj, form, experts.gate_up_proj_scale, experts.gate_up_proj_bias
    a, z = quantized_gate_up(states, *tensors, routing, CONFIG, experts.activation, save_z=True)
    assert z is not None
    slots = routing.order.long()
    matrices = dequantize(form, experts.gate_up_proj, experts.gate_up_proj_scale, torch.float32, 2)
    ids = index.flatten()[slots]
    expected = torch.einsum("soh,sh->so", matrices[ids], states[slots // 2]) + experts.gate_up_proj_bias.detach()[ids]
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    gate, up = z.chunk(2, dim=-1)
    torch.testing.assert_close(a, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", list(SEGMENTS))
@pytest.mark.parametrize("form", [Int8(), BlockFp8((48, 40)), PackedInt4(8, "float32"), Mxfp4()], ids=repr)
@pytest.mark.parametrize(("hidden", "width"), [(96, 64), (64, 32)])
def test_the_gradient_of_the_inputs_is_the_product_with_the_decoded_matrices(projection, form, hidden, width):
    experts, (_, index, _) = held_layer(form, hidden, width), inputs(9, hidden)
    index[2, 0] = -1
    routing: Routing = route(index, EXPERTS, 16)
    values, scales = experts.get_parameter(projection), experts.get_parameter(f"{projection}_scale")
    matrices = dequantize(form, values, scales, torch.float32, SEGMENTS[projection])
    rows, ids = torch.randn(18, matrices.shape[1]), index.flatten()[routing.order.long()]
    expected = torch.einsum("so,soi->si", rows, matrices[ids.clamp(min=0)]) * (ids >= 0).unsqueeze(-1)
    found = quantized_input_gradient(rows, projection, values, form, scales, routing.offsets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", list(SEGMENTS))
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_decoded_matrices_are_what_torch_decodes(projection, form):
    experts = held_layer(form, 192, 64)
    values, scales = experts.get_parameter(projection), experts.get_parameter(f"{projection}_scale")
    expected = dequantize(form, values, scales, torch.float32, SEGMENTS[projection])
    assert torch.equal(decoded(projection, values, form, scales, torch.float32), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_every_byte_of_e8m0_and_every_pair_of_mxfp4_codes():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)
    expected = dequantize(Mxfp4(), values, scales, torch.float32)
    found = decoded("down_proj", values, Mxfp4(), scales, torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_matrices_are_decoded_first_where_rows_are_many_and_memory_suffices():
    weights = 128 * 1536 * 2048
    assert decodes_first(300, weights, torch.bfloat16)
    assert not decodes_first(200, weights, torch.bfloat16)
    assert not decodes_first(300, 10 * weights, torch.bfloat16)
