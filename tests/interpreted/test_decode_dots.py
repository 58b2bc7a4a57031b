"""Integers of 4 and 8 bits through products of matrices, interpreted, give what the decoded weights give.

The interpreter has no products of bfloat16: inputs are float32 here.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch

from moebius.experts.contract import SEGMENTS
from moebius.experts.fused.decode import DecodeTiles, decode_down, decode_gate_up
from moebius.experts.fused.quantized_matrices import Matrices
from moebius.quantization.decoding import dequantize
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4
from tests.interpreted.held_layers import EXPERTS, held_layer, inputs

# the interpreter's own
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

FORMS = [Int8(), Int8("bfloat16"), PackedInt4(128), PackedInt4(256, "float32"), PackedInt4(32), PackedInt4(64)]
RUN = {"int8_row": 64, "int4_pack": 128}


@pytest.fixture
def any_inputs(monkeypatch):
    """As if the inputs were bfloat16."""
    dotted = Matrices.dotted
    monkeypatch.setattr(Matrices, "dotted", lambda self, dtype: dotted(self, torch.bfloat16))


def tiles(form: Form, runs: int) -> DecodeTiles:
    """runs: of 64 bytes; where scales are of less, a block has two."""
    runs = 2 if getattr(form, "group_size", 128) < 128 else runs
    return DecodeTiles(64, RUN[form.name] * runs, 1, dot=True)


def decoded(experts, name: str, form: Form) -> torch.Tensor:
    values, scales = (experts.get_parameter(each) for each in (name, f"{name}_scale"))
    return dequantize(form, values, scales, torch.float32, SEGMENTS[name])


def matrices(form: Form | None, width: int) -> Matrices:
    experts = held_layer(form, width, getattr(form, "group_size", 32))
    return Matrices.of("gate_up_proj", experts.gate_up_proj, form, experts.gate_up_proj_scale)


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.usefixtures("any_inputs")
def test_gate_and_up(form, runs):
    width = 256 if runs == 1 else 768
    experts, (states, index, _) = held_layer(form, width, 256, bias=True), inputs(2, width)
    index[0, 0] = EXPERTS
    found = decode_gate_up(experts, states, index, tiles(form, runs))
    weight, bias = decoded(experts, "gate_up_proj", form), experts.gate_up_proj_bias.float()
    for slot, expert in list(enumerate(index.flatten().tolist()))[1:]:
        gate, up = (weight[expert] @ states[slot // 2] + bias[expert]).chunk(2)
        wanted = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(found[slot], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.usefixtures("any_inputs")
def test_down(form, runs):
    experts, (_, index, weights) = held_layer(form, 256, 768, bias=True), inputs(2, 8)
    rows, index[1, 1] = torch.randn(4, 768), -1
    rows[3] = torch.nan  # and 768 inputs end inside a block of eight runs of 128
    found = decode_down(experts, rows, index, weights, tiles(form, runs))
    weight, bias = decoded(experts, "down_proj", form), experts.down_proj_bias.float()
    wanted = torch.zeros(2, 256)
    for slot, expert in list(enumerate(index.flatten().tolist()))[:3]:
        wanted[slot // 2] += weights.flatten()[slot] * (weight[expert] @ rows[slot] + bias[expert])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [Int8(), PackedInt4(128), PackedInt4(32)], ids=repr)
@pytest.mark.usefixtures("any_inputs")
def test_every_integer_at_every_place(form):
    """One input at a time reads them: an error of place or sign has no sum to hide in."""
    experts = held_layer(form, 128, 128)
    values = experts.get_parameter("down_proj")
    values.data.view(torch.uint8).random_(0, 256)
    rows, index = torch.eye(128)[::9].contiguous(), torch.zeros(15, 1, dtype=torch.int64)
    found = decode_down(experts, rows, index, torch.ones(15, 1), tiles(form, 1))
    assert found.equal(decoded(experts, "down_proj", form)[0].T[::9])


@pytest.mark.usefixtures("any_inputs")
def test_large_sums_of_inputs_keep_their_precision():
    """What every code is first read with must not swallow what it stands for."""
    experts, states = held_layer(PackedInt4(128), 1024, 128), torch.full((1, 1024), 3.0)
    states += torch.randn(1, 1024)
    found = decode_gate_up(experts, states, torch.zeros(1, 1, dtype=torch.int64), tiles(PackedInt4(128), 8))
    gate, up = (decoded(experts, "gate_up_proj", PackedInt4(128))[0] @ states[0]).chunk(2)
    wanted = torch.nn.functional.silu(gate) * up
    assert (found[0] - wanted).norm() < 2e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("form", "width", "dtype", "serves"),
    [
        (Int8(), 768, torch.bfloat16, True),
        (Int8(), 768, torch.float32, False),
        (Int8(), 768, torch.float16, False),
        (Int8(), 70, torch.bfloat16, False),
        (PackedInt4(128), 768, torch.bfloat16, True),
        (PackedInt4(64), 768, torch.bfloat16, True),
        (PackedInt4(16), 768, torch.bfloat16, False),
        (PackedInt4(64), 64, torch.bfloat16, True),
        (Mxfp4(), 768, torch.bfloat16, False),
        (BlockFp8(), 768, torch.bfloat16, False),
        (None, 768, torch.bfloat16, False),
    ],
)
def test_forms_and_widths_that_it_serves(form, width, dtype, serves):
    assert (matrices(form, width).dotted(dtype) is not None) is serves
