"""The CPU backend gives what eager gives, from weights plain or quantized, and its copies never outlive their weights.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import gc

import pytest
import torch

from moebius.config import ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.errors import BackendError
from moebius.experts import cpu_operators, cpu_products
from moebius.experts.contract import SEGMENTS
from moebius.experts.cpu import CpuExperts, cpu_experts, cpu_obstacles
from moebius.experts.eager import eager_experts
from moebius.experts.interface import Experts
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

ACTIVATIONS = (SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7))
FORMS = (Int8(), PackedInt4(), PackedInt4(group_size=8), PackedInt4(scale_dtype="float32"), BlockFp8((24, 48)), Mxfp4())
FLOATS = (torch.float32, torch.bfloat16)


def make_experts(num_experts, hidden=72, width=40, *, bias=False, activation=ACTIVATIONS[0], dtype=torch.float32):
    config = SparseMoe(num_experts, 1, width, SoftmaxTopK(renormalize=True), activation, bias=bias)
    experts = Experts(config, hidden)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return experts.to(dtype)


def make_inputs(tokens, top_k, num_experts, hidden=72, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, num_experts, generator=generator)
    index = scores.topk(top_k).indices if tokens else torch.empty(0, top_k, dtype=torch.long)
    return states, index, torch.rand(tokens, top_k, generator=generator)


def hold(experts: Experts, form: Form) -> Experts:
    """Rounds the experts' weights to a form; the same numbers, decoded to float32, are in the experts returned."""
    plain = make_experts(experts.num_experts, 128, 96, bias=experts.gate_up_proj_bias is not None)
    plain.load_state_dict(experts.state_dict())
    for name, segments in SEGMENTS.items():
        values, scales = quantize(form, experts.get_parameter(name).detach(), segments)
        plain.get_parameter(name).data = dequantize(form, values, scales, torch.float32, segments)
        experts.hold(name, form)
        experts.get_parameter(name).data, experts.get_parameter(f"{name}_scale").data = values, scales
    return plain


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def exact_output(experts: Experts, states, index, weights) -> torch.Tensor:
    wide = make_experts(experts.num_experts, bias=experts.gate_up_proj_bias is not None, activation=experts.activation)
    wide.load_state_dict(experts.state_dict())
    with torch.no_grad():
        return eager_experts(wide, states.float(), index, weights)


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def bfloat16_products(request, monkeypatch):
    """With instructions for products in bfloat16, and on a CPU without."""
    monkeypatch.setattr(cpu_operators, "multiplies", lambda dtype: request.param or dtype == torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 1), (3, 3), (8, 2), (160, 8)])
def test_float32_is_what_eager_gives(num_experts, top_k, tokens, activation, bias):
    experts = make_experts(num_experts, bias=bias, activation=activation)
    inputs = make_inputs(tokens, top_k, num_experts)
    torch.testing.assert_close(cpu_experts(experts, *inputs), eager_experts(experts, *inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("tokens", [3, 17, 400])
def test_bfloat16_is_as_near_to_float32_as_eager(tokens, activation, bias):
    experts = make_experts(8, bias=bias, activation=activation, dtype=torch.bfloat16)
    inputs = make_inputs(tokens, 2, 8, dtype=torch.bfloat16)
    exact = exact_output(experts, *inputs)
    found = cpu_experts(experts, *inputs)
    assert found.dtype == torch.bfloat16
    assert error(found, exact) <= 1.1 * error(eager_experts(experts, *inputs), exact)


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_quantized_weights_are_multiplied_as_if_decoded(tokens, dtype, form, bias):
    held = make_experts(4, 128, 96, bias=bias, dtype=dtype)
    plain = hold(held, form)
    inputs = make_inputs(tokens, 2, 4, hidden=128, dtype=dtype)
    exact = eager_experts(plain, inputs[0].float(), *inputs[1:])
    # one token alone has too few numbers for errors to average
    bound = 1.1 if tokens > 1 else 1.4
    assert error(cpu_experts(held, *inputs), exact) <= bound * error(eager_experts(held, *inputs), exact) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8_works", "int4_works"])
@pytest.mark.parametrize("form", [Int8(), PackedInt4()], ids=str)
def test_where_an_operator_does_not_work_the_weights_are_decoded(monkeypatch, form, name):
    held = make_experts(4, 128, 96)
    plain = hold(held, form)
    states, index, weights = make_inputs(3, 2, 4, hidden=128)
    monkeypatch.setattr(cpu_operators, name, lambda: False)
    found = cpu_experts(held, states.bfloat16(), index, weights)
    assert error(found, eager_experts(plain, states.bfloat16().float(), index, weights)) < 0.01


def test_the_operators_are_used_where_they_can_be(monkeypatch):
    used = []
    for name in ("int8_product", "int4_product", "packed_linear"):
        monkeypatch.setattr(cpu_operators, name, spied(getattr(cpu_operators, name), used))
    states, index, weights = make_inputs(3, 1, 4, hidden=128)
    for form in (Int8(), PackedInt4()):
        held = make_experts(4, 128, 96)
        hold(held, form)
        with torch.no_grad():
            cpu_experts(held, states.bfloat16(), index, weights)
    assert set(used) == {"int8_product", "int4_product"}


def spied(function, used):
    def spy(*arguments):
        used.append(function.__name__)
        return function(*arguments)

    return spy


@torch.no_grad()
def test_many_rows_are_widened_through_one_place_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(cpu_operators, "multiplies", lambda dtype: dtype == torch.float32)
    packed = []
    monkeypatch.setattr(cpu_operators, "packed_linear", spied(cpu_operators.packed_linear, packed))
    experts = make_experts(2, dtype=torch.bfloat16)
    cpu_experts(experts, *make_inputs(2 * cpu_products.FEW_ROWS, 2, 2, dtype=torch.bfloat16))
    assert not packed
    cpu_experts(experts, *make_inputs(cpu_products.FEW_ROWS - 1, 2, 2, dtype=torch.bfloat16))
    assert len(packed) == 4


@torch.no_grad()
@pytest.mark.parametrize("foreign", [-1, 8, 10_000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_foreign_slot_adds_nothing_and_is_not_read(foreign, dtype):
    experts = make_experts(8, bias=True, dtype=dtype)
    states, index, weights = make_inputs(5, 2, 8, dtype=dtype)
    index[1], index[3, 0] = foreign, foreign
    alone = cpu_experts(experts, states[[0, 2, 4]], index[[0, 2, 4]], weights[[0, 2, 4]])
    states[1], weights[1], weights[3, 0] = torch.nan, torch.nan, torch.nan
    found = cpu_experts(experts, states, index, weights)
    assert found.isfinite().all()
    assert found[1].eq(0).all()
    assert found[3].ne(0).any()
    torch.testing.assert_close(found[[0, 2, 4]], alone, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@torch.no_grad()
def test_strided_inputs_and_transposed_weights():
    experts = make_experts(8)
    states, index, weights = make_inputs(17, 2, 8)
    expected = eager_experts(experts, states, index, weights)
    wide = torch.stack([states, torch.full_like(states, torch.nan)], dim=-1)
    for name in SEGMENTS:
        weight = experts.get_parameter(name)
        weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        assert not weight.is_contiguous()
    found = cpu_experts(experts, wide[..., 0], index.t().contiguous().t(), weights.t().contiguous().t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_repeat_and_inputs_are_left_alone(dtype):
    experts, inputs = make_experts(8, dtype=dtype), make_inputs(130, 2, 8, dtype=dtype)
    before = [tensor.clone() for tensor in (*inputs, *experts.parameters())]
    assert torch.equal(cpu_experts(experts, *inputs), cpu_experts(experts, *inputs))
    assert all(map(torch.equal, (*inputs, *experts.parameters()), before))


def doubled_in_place(experts: Experts) -> None:
    experts.down_proj.mul_(2)


def doubled_through_data(experts: Experts) -> None:
    experts.down_proj.data.mul_(2)


def replaced_data(experts: Experts) -> None:
    experts.down_proj.data = experts.down_proj.data * 2


def replaced(experts: Experts) -> None:
    experts.down_proj = torch.nn.Parameter(experts.down_proj * 2)


def loaded(experts: Experts) -> None:
    experts.load_state_dict({**experts.state_dict(), "down_proj": experts.down_proj * 2})


def doubled_one_expert(experts: Experts) -> None:
    experts.down_proj.data[5].mul_(2)
    experts.down_proj.data[:5].mul_(2)
    experts.down_proj.data[6:].mul_(2)


def first_row_doubled_in_place(experts: Experts) -> None:
    experts.down_proj[:, 0].mul_(2)


def first_row_doubled_elsewhere(experts: Experts) -> None:
    elsewhere = experts.down_proj.clone()
    elsewhere[:, 0] *= 2
    experts.down_proj.data = elsewhere


@torch.no_grad()
@pytest.mark.parametrize("change", [first_row_doubled_in_place, first_row_doubled_elsewhere])
def test_a_change_of_one_row_is_seen(change):
    experts, inputs = make_experts(8), make_inputs(17, 2, 8)
    before = cpu_experts(experts, *inputs)
    change(experts)
    after = cpu_experts(experts, *inputs)
    torch.testing.assert_close(after[:, 0], before[:, 0] * 2)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize(
    "change", [doubled_in_place, doubled_through_data, replaced_data, replaced, loaded, doubled_one_expert]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_changed_weights_are_packed_anew(change, mode):
    experts, inputs = make_experts(8), make_inputs(17, 2, 8)
    with mode():
        before = cpu_experts(experts, *inputs)
        change(experts)
        after = cpu_experts(experts, *inputs)
    torch.testing.assert_close(after, before * 2)


@torch.no_grad()
def test_changed_four_bit_scales_are_packed_anew():
    held = make_experts(4, 128, 96)
    hold(held, PackedInt4())
    states, index, weights = make_inputs(3, 2, 4, hidden=128)
    before = cpu_experts(held, states.bfloat16(), index, weights)
    held.down_proj_scale.data.mul_(2)
    torch.testing.assert_close(cpu_experts(held, states.bfloat16(), index, weights), before * 2)


@torch.no_grad()
def test_only_experts_with_rows_are_packed_and_copies_go_with_their_layer():
    backend, experts, packed = CpuExperts(), make_experts(8), []
    states, _, weights = make_inputs(3, 1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_operators, "pack_linear", spied(cpu_operators.pack_linear, packed))
        for _ in range(2):
            backend(experts, states, torch.tensor([[6], [2], [6]]), weights)
        assert len(packed) == 4  # two projections of experts 2 and 6, once
        backend.release(experts)
        backend(experts, states, torch.full((3, 1), 6), weights)
        assert len(packed) == 6
    assert len(backend) == 1
    del experts
    gc.collect()
    assert len(backend) == 0


def test_a_state_dict_is_what_it_was():
    experts = make_experts(8, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    with torch.no_grad():
        cpu_experts(experts, *make_inputs(17, 2, 8, dtype=torch.bfloat16))
    after = experts.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gradient_is_refused_by_name():
    inputs = make_inputs(3, 2, 8)
    with pytest.raises(BackendError, match="gradients"):
        cpu_experts(make_experts(8), *inputs)
    inputs[2].requires_grad_()
    with pytest.raises(BackendError, match="no_grad"):
        cpu_experts(make_experts(8).requires_grad_(False), *inputs)


def test_every_obstacle_is_named():
    obstacles = cpu_obstacles("cuda", torch.float64, needs_grad=True)
    assert [obstacle.split()[0] for obstacle in obstacles] == ["device", "dtype", "gradients"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_there_is_no_obstacle_here(dtype):
    assert cpu_obstacles("cpu", dtype) == []


@pytest.mark.parametrize("fault", ["absent", "wrong"])
def test_an_operator_is_tried_before_it_is_trusted(monkeypatch, fault):
    def broken(rows, packed, bias):
        if fault == "absent":
            raise RuntimeError("no such operator\nand more")
        return rows.new_ones(len(rows), 48)

    monkeypatch.setattr(cpu_operators, "packed_linear", broken)
    found = cpu_operators.packed_linear_obstacle.__wrapped__(torch.float32)
    assert found == {"absent": "no such operator", "wrong": "wrong result"}[fault]


def test_the_number_of_threads_and_the_generator_are_left_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    cpu_operators.packed_linear_obstacle.__wrapped__(torch.bfloat16)
    with torch.no_grad():
        cpu_experts(make_experts(3), *make_inputs(3, 1, 3))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
