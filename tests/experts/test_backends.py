"""Every backend gives what eager gives in float32, and eager what the formula gives: outputs and every gradient, at odd
sizes, for every activation, with biases and without.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import pytest
import torch

from moebius.config import Activation, ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, Experts

HIDDEN, WIDTH = 72, 40
BACKENDS = ("batched_mm", "grouped_mm")
EVERY_BACKEND = ("eager", *BACKENDS)
ACTIVATIONS = (SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7))  # a limit that numbers around one reach, on either side


def make_experts(
    num_experts: int, *, bias: bool = False, activation: Activation = ACTIVATIONS[0], seed: int = 0
) -> Experts:
    config = SparseMoe(num_experts, 1, WIDTH, SoftmaxTopK(renormalize=True), activation, bias=bias)
    experts = Experts(config, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return experts


def make_inputs(tokens: int, top_k: int, num_experts: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    return hidden_states, scores.topk(top_k).indices if tokens else torch.empty(0, top_k, dtype=torch.long), weights


def run(name: str, experts: Experts, hidden_states, index, weights) -> dict[str, torch.Tensor]:
    """The output, and the gradients of states, weights and parameters under a fixed random output gradient."""
    states, scores = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = {**ALL_EXPERTS_FUNCTIONS, "formula": formula}[name](experts, states, index, scores)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    leaves = {"hidden_states": states, "top_k_weights": scores, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output, **dict(zip(leaves, grads, strict=True))}


def formula(experts: Experts, hidden_states, index, weights) -> torch.Tensor:
    """Slot by slot, as it is written down."""
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    gate_up_bias, down_bias = (torch.zeros(experts.num_experts, 1) if bias is None else bias for bias in biases)
    rows = []
    for state, ids, scores in zip(hidden_states, index.tolist(), weights, strict=True):
        row = torch.zeros(HIDDEN)
        for e, score in zip(ids, scores, strict=True):
            gate, up = (experts.gate_up_proj[e] @ state + gate_up_bias[e]).split(WIDTH)
            row = row + score * (experts.down_proj[e] @ activated(experts.activation, gate, up) + down_bias[e])
        rows.append(row)
    return torch.stack(rows)


def activated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    match activation:
        case SwiGLU():
            return gate * torch.sigmoid(gate) * up
        case ClampedSwiGLU(alpha, limit):
            gate = torch.where(gate > limit, limit, gate)
            up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
            return gate * torch.sigmoid(alpha * gate) * (up + 1)


def assert_like_eager(name: str, experts: Experts, *inputs: torch.Tensor) -> None:
    assert_same(name, run(name, experts, *inputs), run("eager", experts, *inputs))


def assert_same(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, rtol=1e-5, atol=1e-5, msg=lambda m, w=what: f"{name} {w}: {m}")


def every_layer(test):
    """Runs the test for each activation, with biases and without."""
    return pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)(
        pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])(test)
    )


@every_layer
@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_a_backend_is_the_formula(name, activation, bias):
    experts, inputs = make_experts(3, bias=bias, activation=activation), make_inputs(7, 2, 3)
    assert_same(name, run(name, experts, *inputs), run("formula", experts, *inputs))


@every_layer
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 1), (3, 3), (8, 2), (160, 8)])
def test_a_backend_gives_what_eager_gives(name, tokens, num_experts, top_k, activation, bias):
    experts = make_experts(num_experts, bias=bias, activation=activation)
    assert_like_eager(name, experts, *make_inputs(tokens, top_k, num_experts))


@pytest.mark.parametrize("name", BACKENDS)
def test_one_hot_expert_and_empty_ones(name):
    hidden_states, _, weights = make_inputs(17, 1, 8)
    assert_like_eager(name, make_experts(8), hidden_states, torch.full((17, 1), 6), weights)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_inputs(name):
    hidden_states, index, weights = make_inputs(17, 2, 8)
    wide = torch.stack([hidden_states, torch.full_like(hidden_states, torch.nan)], dim=-1)
    strided = wide[..., 0], index.t().contiguous().t(), weights.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_like_eager(name, make_experts(8), *strided)


@pytest.mark.parametrize("name", EVERY_BACKEND)
@pytest.mark.parametrize("foreign", [-1, 8, 10_000])
def test_a_foreign_slot_adds_nothing_is_not_read_and_gets_no_gradient(name, foreign):
    experts = make_experts(8, bias=True)
    hidden_states, index, weights = make_inputs(5, 2, 8)
    index[1], index[3, 0] = foreign, foreign
    alone = run(name, experts, hidden_states[[0, 2, 4]], index[[0, 2, 4]], weights[[0, 2, 4]])
    hidden_states[1], weights[1] = torch.nan, torch.nan  # a row that nobody owns here may be uninitialised
    weights[3, 0] = torch.nan
    found = run(name, experts, hidden_states, index, weights)
    assert all(value.isfinite().all() for value in found.values())
    assert found["output"][1].eq(0).all()
    assert found["hidden_states"][1].eq(0).all()
    assert found["top_k_weights"][1].eq(0).all()
    assert found["top_k_weights"][3, 0] == 0
    assert found["top_k_weights"][3, 1] != 0
    torch.testing.assert_close(found["output"][[0, 2, 4]], alone["output"])


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_all_ids_foreign_give_zeros_and_zero_gradients(name):
    hidden_states, index, weights = make_inputs(3, 2, 8)
    found = run(name, make_experts(8), hidden_states, torch.full_like(index, -1), weights)
    assert all(value.eq(0).all() for value in found.values())


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_no_tokens_give_an_empty_result_joined_to_the_graph(name):
    experts = make_experts(3)
    found = run(name, experts, *make_inputs(0, 2, 3))
    assert found["output"].shape == (0, HIDDEN)
    assert found["gate_up_proj"].eq(0).all()
    assert found["down_proj"].eq(0).all()


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_bits_repeat_and_inputs_are_left_alone(name):
    inputs = make_inputs(130, 2, 8)
    before = [tensor.clone() for tensor in inputs]
    experts = make_experts(8)
    first, second = run(name, experts, *inputs), run(name, experts, *inputs)
    assert all(torch.equal(first[what], second[what]) for what in first)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


@every_layer
@pytest.mark.parametrize(("name", "bound"), [("grouped_mm", 1.1), ("batched_mm", 2.5)])
def test_bfloat16_is_as_near_to_float32_as_eager(name, bound, activation, bias):
    """batched_mm adds the rows of a weight's or bias's gradient in bfloat16, and may be more than twice as far."""
    inputs = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in make_inputs(130, 2, 8)]
    narrow, exact = (make_experts(8, bias=bias, activation=activation).bfloat16() for _ in range(2))
    exact.float()
    wide = run("eager", exact, *(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs))
    judge, found = run("eager", narrow, *inputs), run(name, narrow, *inputs)
    for what, value in wide.items():
        assert found[what].dtype == torch.bfloat16
        assert (found[what] - value).norm() <= bound * (judge[what] - value).norm() + 1e-6, what


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_float32_weights_beside_bfloat16_states_are_not_rounded(name):
    experts = make_experts(8).bfloat16()
    hidden_states, index, weights = make_inputs(17, 2, 8)
    found = run(name, experts, hidden_states.bfloat16(), index, weights)
    assert found["output"].dtype == torch.bfloat16
    assert found["top_k_weights"].dtype == torch.float32


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_frozen_weights_get_no_gradient(name):
    experts = make_experts(8).requires_grad_(False)
    hidden_states, index, weights = make_inputs(17, 2, 8)
    hidden_states.requires_grad_()
    ALL_EXPERTS_FUNCTIONS[name](experts, hidden_states, index, weights).sum().backward()
    assert hidden_states.grad is not None
    assert experts.gate_up_proj.grad is None
