"""The kernels for a handful of tokens, interpreted, give what eager gives, plain and in every quantized form.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch

from moebius.config import ClampedSwiGLU, SwiGLU
from moebius.errors import BackendError
from moebius.experts.eager import eager_experts
from moebius.experts.fused import decode
from moebius.experts.fused.decode import DecodeTiles, decode_down, decode_experts, decode_gate_up, decode_serves
from moebius.experts.interface import Experts
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.interpreted.held_layers import EXPERTS, held_layer, inputs

# the interpreter's own
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

FORMS = [
    None,
    Int8(),
    Int8("bfloat16"),
    BlockFp8((48, 40)),  # blocks that fit neither the kernels' rows nor the matrices
    BlockFp8(scale_dtype="float8_e8m0fnu"),
    PackedInt4(),
    PackedInt4(8, "float32"),
    PackedInt4(64),
    Mxfp4(),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Blocks that end inside rows and matrices, of which there are few."""
    for name in ("GATE_UP_TILES", "DOWN_TILES"):
        monkeypatch.setattr(decode, name, dict.fromkeys(getattr(decode, name), DecodeTiles(32, 128, 1)))


@torch.no_grad()
def assert_like_eager(experts: Experts, *tensors: torch.Tensor) -> None:
    torch.testing.assert_close(
        decode_experts(experts, *tensors), eager_experts(experts, *tensors), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize(("hidden", "width"), [(192, 64), (64, 192)])
def test_every_form_gives_what_eager_gives(form, hidden, width):
    assert_like_eager(held_layer(form, hidden, width), *inputs(3, hidden))


@pytest.mark.parametrize("form", [None, Int8(), BlockFp8((48, 40)), PackedInt4(8)], ids=repr)
def test_odd_sizes(form):
    assert_like_eager(held_layer(form, 72, 40), *inputs(2, 72))


@pytest.mark.parametrize(
    "activation", [SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7)], ids=lambda each: type(each).__name__
)
@pytest.mark.parametrize("form", [None, Mxfp4()], ids=repr)
def test_biases_and_activations(activation, form):
    assert_like_eager(held_layer(form, 64, 96, activation=activation, bias=True), *inputs(2, 64))


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_foreign_slots_are_not_read_and_add_nothing(form):
    """Their rows between the launches hold NaN, and so do their states and weights."""
    experts, (states, index, weights) = held_layer(form, 192, 64, bias=True), inputs(3, 192)
    index[0], index[1, 1], index[2, 0] = -1, EXPERTS, 2**40
    states[0], weights[0] = torch.nan, torch.nan
    rows = decode_gate_up(experts, states, index)
    rows[((index < 0) | (index >= EXPERTS)).flatten()] = torch.nan
    found = decode_down(experts, rows, index, weights)
    with torch.no_grad():
        torch.testing.assert_close(found, eager_experts(experts, states, index, weights), rtol=1e-5, atol=1e-5)
    assert not found[0].any()


def test_e8m0_scales_reach_both_ends():
    experts, (states, index, weights) = held_layer(Mxfp4(), 64, 32), inputs(2, 64)
    scales = experts.get_parameter("gate_up_proj_scale")
    scales.data[:] = torch.randint(0, 38, scales.shape, dtype=torch.uint8)
    states *= 2.0**90
    assert_like_eager(experts, states, index, weights)
    scales.data[:] = 255
    assert decode_experts(experts, states, index, weights).isnan().all()


def test_all_codes_of_four_bits():
    """One row holds the sixteen codes; one input at a time reads them."""
    for form in (PackedInt4(), Mxfp4()):
        experts = held_layer(form, 32, 32)
        codes = torch.arange(16, dtype=torch.uint8).repeat(2).view(16, 2)
        packed = (codes[:, 0] | codes[:, 1] << 4).view(experts.gate_up_proj.dtype)
        experts.gate_up_proj.data[:] = packed.view(experts.gate_up_proj.shape[2:])
        states, index = torch.eye(32), torch.zeros(32, 1, dtype=torch.int64)
        assert_like_eager(experts, states, index, torch.ones(32, 1))


def test_no_tokens():
    experts = held_layer(None, 64, 32)
    assert decode_experts(experts, *inputs(0, 64)).shape == (0, 64)


def test_strided_states_are_taken_and_strided_weights_refused():
    experts, (states, index, weights) = held_layer(None, 64, 32), inputs(3, 64)
    assert_like_eager(experts, states.T.contiguous().T, index.T.contiguous().T, weights)
    experts.down_proj.data = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(BackendError, match="down_proj: expected contiguous"):
        decode_experts(experts, states, index, weights)


def test_groups_that_no_load_fits_are_refused():
    with pytest.raises(BackendError, match="int4_pack: expected groups of a multiple of 8 inputs, found 4"):
        decode_experts(held_layer(PackedInt4(4), 64, 32), *inputs(1, 64))


@pytest.mark.parametrize(
    ("num_experts", "tokens", "top_k", "serves"),
    [
        (128, 1, 8, True),
        (128, 8, 8, True),
        (128, 9, 8, False),
        (8, 2, 2, True),
        (8, 3, 2, False),
        (64, 8, 8, False),
        (8, 0, 2, False),
        (4, 1, 4, True),
        (4, 2, 4, False),
    ],
)
def test_it_serves_while_few_slots_share_an_expert(num_experts, tokens, top_k, serves):
    assert decode_serves(num_experts, tokens, top_k) is serves
