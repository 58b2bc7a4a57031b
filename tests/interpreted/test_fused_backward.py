"""The fused backend through Triton's interpreter: outputs and every gradient against eager in float64, at odd sizes,
with every buffer that it allocates full of NaN at first.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from moebius.config import Activation, ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.eager import eager_experts
from moebius.experts.fused import passes
from moebius.experts.fused.backward import bias_gradient, largest_first, weight_gradient
from moebius.experts.fused.backward_tiles import LARGE, SMALL, BackwardTiles
from moebius.experts.fused.launch import fused_experts
from moebius.experts.fused.layer import layer_of, spelled, tensors_of
from moebius.experts.fused.routing import route, tiled
from moebius.experts.fused.tuning import TileConfig
from moebius.experts.interface import Experts
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.interpreted.held_layers import held_layer
from tests.interpreted.held_layers import inputs as held_inputs

HIDDEN, WIDTH = 72, 40
CLAMPED = ClampedSwiGLU(alpha=1.7, limit=0.7)  # a limit that numbers around one reach, on either side
# none of them divides HIDDEN or WIDTH; 64 columns are finished in two pieces
ODD = BackwardTiles(TileConfig(16, 64, 32, 4, 1), TileConfig(16, 32, 32, 4, 1), TileConfig(64, 32, 16, 4, 1))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN, and integers their largest number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["odd", "small", "large"])
def tiles(request, monkeypatch):
    chosen = {"odd": ODD, "small": SMALL, "large": LARGE}[request.param]
    monkeypatch.setattr(passes, "backward_tiles", lambda capability, rows_per_expert: chosen)


def layer(num_experts: int, *, bias: bool = False, activation: Activation | None = None) -> Experts:
    torch.manual_seed(0)
    config = SparseMoe(num_experts, 1, WIDTH, SoftmaxTopK(renormalize=True), activation or SwiGLU(), bias=bias)
    experts = Experts(config, HIDDEN)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def inputs(tokens: int, top_k: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    index = torch.rand(tokens, num_experts).topk(top_k).indices if tokens else torch.empty(0, top_k, dtype=torch.long)
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, top_k)


def run(function, experts: Experts, states, index, weights, **options) -> dict[str, torch.Tensor]:
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = function(experts, states, index, weights, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    leaves = {"hidden_states": states, "top_k_weights": weights, **dict(experts.named_parameters())}
    return {
        "output": output,
        **dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad), strict=True)),
    }


def assert_like_eager(experts: Experts, states, index, weights, **options) -> None:
    found = run(fused_experts, experts, states, index, weights, **options)
    expected = run(eager_experts, experts.double(), states.double(), index, weights.double())
    for what, value in expected.items():
        torch.testing.assert_close(
            found[what].double(), value, rtol=1e-5, atol=2e-5, msg=lambda m, what=what: f"{what}: {m}"
        )


@pytest.mark.parametrize("activation", [SwiGLU(), CLAMPED], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_every_gradient_is_that_of_eager(tiles, activation, bias):
    assert_like_eager(layer(3, bias=bias, activation=activation), *inputs(17, 2, 3))


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 1, 3), (3, 1, 3), (5, 3, 3), (33, 1, 2), (9, 2, 12)])
def test_few_tokens_one_expert_a_token_all_of_them_and_more_experts_than_rows(tokens, top_k, num_experts):
    assert_like_eager(layer(num_experts, bias=True), *inputs(tokens, top_k, num_experts))


def test_one_hot_expert_and_empty_ones(tiles):
    states, _, weights = inputs(40, 1, 4)
    assert_like_eager(layer(4, bias=True), states, torch.full((40, 1), 2), weights)


def test_with_recompute_the_gradients_are_the_same_bits():
    experts, given = layer(3, bias=True), inputs(17, 2, 3)
    kept, recomputed = (run(fused_experts, experts, *given, recompute=each) for each in (False, True))
    assert all(torch.equal(kept[what], recomputed[what]) for what in kept)


@pytest.mark.parametrize("foreign", [-1, 8, 10_000])
def test_a_foreign_slot_adds_nothing_is_not_read_and_gets_no_gradient(foreign):
    experts = layer(8, bias=True)
    states, index, weights = inputs(5, 2, 8)
    index[1], index[3, 0] = foreign, foreign
    alone = run(fused_experts, experts, states[[0, 2, 4]], index[[0, 2, 4]], weights[[0, 2, 4]])
    states[1], weights[1], weights[3, 0] = torch.nan, torch.nan, torch.nan
    found = run(fused_experts, experts, states, index, weights)
    assert all(value.isfinite().all() for value in found.values())
    assert found["hidden_states"][1].eq(0).all()
    assert found["top_k_weights"][1].eq(0).all()
    assert found["top_k_weights"][3, 0] == 0
    assert found["top_k_weights"][3, 1] != 0
    torch.testing.assert_close(found["output"][[0, 2, 4]], alone["output"])
    assert_like_eager(experts, states, index, weights)


def test_all_ids_foreign_give_zeros_and_zero_gradients():
    states, index, weights = inputs(3, 2, 8)
    found = run(fused_experts, layer(8, bias=True), states, torch.full_like(index, -1), weights)
    assert all(value.eq(0).all() for value in found.values())


def test_no_tokens_give_an_empty_result_joined_to_the_graph():
    found = run(fused_experts, layer(3, bias=True), *inputs(0, 2, 3))
    assert found["output"].shape == (0, HIDDEN)
    assert all(value.eq(0).all() for value in found.values())


def test_strided_inputs():
    states, index, weights = inputs(9, 2, 3)
    states = torch.stack([states, torch.full_like(states, torch.nan)], dim=-1)[..., 0]
    assert_like_eager(layer(3), states, index.t().contiguous().t(), weights.t().contiguous().t())


def test_an_expanded_gradient_is_read_as_what_it_stands_for():
    experts, (states, index, weights) = layer(3), inputs(9, 2, 3)
    states.requires_grad_()
    found = torch.autograd.grad(fused_experts(experts, states, index, weights).sum(), states)
    expected = torch.autograd.grad(eager_experts(experts, states, index, weights).sum(), states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_bits_repeat_and_inputs_are_left_alone():
    experts, given = layer(3, bias=True), inputs(17, 2, 3)
    before = [tensor.clone() for tensor in given]
    first, second = run(fused_experts, experts, *given), run(fused_experts, experts, *given)
    assert all(torch.equal(first[what], second[what]) for what in first)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_frozen_weights_get_no_gradient_and_no_product_is_made_for_one(monkeypatch):
    experts, (states, index, weights) = layer(3, bias=True).requires_grad_(False), inputs(9, 2, 3)
    monkeypatch.setattr(passes.backward, "weight_gradient", None)
    monkeypatch.setattr(passes.backward, "bias_gradient", None)
    states.requires_grad_()
    fused_experts(experts, states, index, weights).sum().backward()
    assert states.grad is not None
    assert experts.gate_up_proj.grad is None


def test_one_trained_parameter_alone_gets_its_own_gradient():
    given = inputs(9, 2, 3)
    experts = layer(3, bias=True).requires_grad_(False)
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_()
        found, expected = (
            torch.autograd.grad(function(experts, *given).square().sum(), parameter)[0]
            for function in (fused_experts, eager_experts)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        parameter.requires_grad_(False)


def test_a_second_derivative_raises():
    experts, (states, index, weights) = layer(3), inputs(5, 2, 3)
    states.requires_grad_()
    (grad,) = torch.autograd.grad(fused_experts(experts, states, index, weights).sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_experts_backward"):
        grad.sum().backward()


def test_without_gradients_the_output_is_the_same():
    experts, (states, index, weights) = layer(3, bias=True, activation=CLAMPED), inputs(17, 2, 3)
    expected = run(fused_experts, experts, states, index, weights)["output"]
    with torch.no_grad():
        torch.testing.assert_close(fused_experts(experts, states, index, weights), expected)


def test_torch_compile_sees_one_operator_each_way():
    experts, (states, index, weights) = layer(3, bias=True, activation=CLAMPED), inputs(9, 2, 3)
    nodes = []

    def backend(graph, example_inputs):
        nodes.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(fused_experts, backend=backend, fullgraph=True)
    found, expected = (run(each, experts, states, index, weights) for each in (compiled, fused_experts))
    assert all(torch.equal(found[what], expected[what]) for what in expected)
    assert [str(target).startswith("moebius.fused_experts_training") for target in nodes[0]].count(True) == 1


def test_the_operators_keep_the_promises_that_torch_compile_relies_on():
    experts, (states, index, weights) = layer(3, bias=True), inputs(5, 2, 3)
    layer_arguments = [*experts.parameters(), None, None, spelled(experts)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for tokens in (0, 5):
        given = states[:tokens].clone().requires_grad_(), index[:tokens], weights[:tokens], *layer_arguments
        training = torch.ops.moebius.fused_experts_training.default
        torch.library.opcheck(training, (*given, False), test_utils=tests)
        torch.library.opcheck(torch.ops.moebius.fused_experts.default, given, test_utils=tests)


def test_tiles_of_a_sorted_order_are_those_that_routing_finds():
    index = torch.randint(-1, 13, (50, 3), generator=torch.Generator().manual_seed(0))
    for block_m in (16, 64):
        found, expected = tiled(*_sorted(index, 12), 3, block_m), route(index, 12, block_m)
        assert torch.equal(found.tile_expert, expected.tile_expert)
        assert torch.equal(found.num_tiles, expected.num_tiles)
        owned = expected.tile_expert >= 0
        assert torch.equal(found.tile_row[owned], expected.tile_row[owned])


def _sorted(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    routing = route(index, num_experts, 128)
    return routing.order, routing.inverse, routing.offsets


def test_sums_over_an_experts_rows_stop_at_its_last_row():
    """Rows of tokens and sorted rows hold NaN where other experts' rows, or nobody's, begin."""
    index = torch.tensor([[0], [0], [0], [2], [9]])
    routing = route(index, 3, 16)
    rows = torch.randn(5, HIDDEN)
    rows[3:] = torch.nan
    given = {"left_by_token": True, "right_by_token": False}
    found = weight_gradient(rows, rows, routing, largest_first(routing), TileConfig(32, 64, 16, 4, 1), **given)
    torch.testing.assert_close(found[0], rows[:3].T @ rows[:3])
    assert found[1].eq(0).all()
    assert found[2].isnan().all()
    torch.testing.assert_close(bias_gradient(rows, routing)[0], rows[:3].sum(0))


@pytest.mark.parametrize("form", [Int8(), BlockFp8((48, 40)), PackedInt4(), Mxfp4()], ids=lambda each: each.name)
def test_experts_in_quantized_forms_pass_gradients_to_states_and_routing_weights(form):
    experts = held_layer(form, 64, 96, activation=CLAMPED, bias=True)
    states, index, weights = held_inputs(17, 64)
    index[2, 0], states[3], index[3] = -1, torch.nan, experts.num_experts
    states, weights = states.requires_grad_(), weights.requires_grad_()
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        experts.get_parameter(name).requires_grad_()
    leaves = [states, weights, *(each for each in experts.parameters() if each.requires_grad)]
    outputs = [function(experts, states, index, weights) for function in (fused_experts, eager_experts)]
    grad = torch.randn_like(outputs[0])
    for found, expected in zip(*(torch.autograd.grad(each, leaves, grad) for each in outputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def assert_passes_gradients_like_eager(experts: Experts) -> None:
    states, index, weights = held_inputs(17, 64)
    index[2, 0] = -1
    leaves = [states.requires_grad_(), weights.requires_grad_()]
    outputs = [function(experts, states, index, weights) for function in (fused_experts, eager_experts)]
    grad = torch.randn_like(outputs[0])
    for found, expected in zip(*(torch.autograd.grad(each, leaves, grad) for each in outputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [Int8(), BlockFp8((48, 40)), PackedInt4(), Mxfp4()], ids=lambda each: each.name)
def test_forms_that_are_decoded_first_give_the_same(monkeypatch, form):
    monkeypatch.setattr(passes, "decodes_first", lambda rows_per_expert, num_weights, dtype: True)
    monkeypatch.setattr(passes, "quantized_gate_up", None)
    monkeypatch.setattr(passes, "quantized_input_gradient", None)
    assert_passes_gradients_like_eager(held_layer(form, 64, 96, activation=CLAMPED, bias=True))


@pytest.mark.parametrize("decoded", ["gate_up_proj", "down_proj"])
def test_one_projection_alone_may_be_plain(monkeypatch, decoded):
    experts = held_layer(Int8(), 64, 96, bias=True)
    num_weights = {"gate_up_proj": 2 * 96 * 64, "down_proj": 64 * 96}[decoded] * experts.num_experts
    monkeypatch.setattr(passes, "decodes_first", lambda rows_per_expert, weights, dtype: weights == num_weights)
    assert_passes_gradients_like_eager(experts)


def test_a_layer_is_spelled_and_read_back():
    for form in (None, Int8("bfloat16"), BlockFp8((64, 32), "float8_e8m0fnu"), PackedInt4(64), Mxfp4()):
        for activation in (SwiGLU(), ClampedSwiGLU(1.7019999, 7.1)):
            experts = held_layer(form, 128, 128, activation=activation)
            read = layer_of(*tensors_of(experts), spelled(experts))
            assert (read.gate_up_proj_form, read.down_proj_form, read.activation) == (form, form, activation)
            assert read.num_experts == experts.num_experts
