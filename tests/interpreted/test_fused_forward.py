"""The kernels of the forward give what eager gives, at odd sizes, read by descriptors or by addresses, tall or swapped.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch

from moebius.config import ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.errors import ArgumentError
from moebius.experts.eager import eager_experts
from moebius.experts.fused import operands
from moebius.experts.fused.forward import combine, down, gate_up
from moebius.experts.fused.routing import Routing, route
from moebius.experts.fused.tuning import TileConfig
from moebius.experts.interface import Experts

ACTIVATIONS = (SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7))
TALL = TileConfig(16, 32, 32, 4, 2, group_m=2)
SWAPPED = TileConfig(16, 64, 32, 4, 2, swapped=True)
ALIGNED, MISALIGNED = (72, 40), (70, 38)  # floats: rows of 16 bytes' multiples, and not


def make(sizes, num_experts=5, *, bias=False, activation=ACTIVATIONS[0]) -> Experts:
    hidden_size, width = sizes
    config = SparseMoe(num_experts, 1, width, SoftmaxTopK(renormalize=True), activation, bias=bias)
    experts = Experts(config, hidden_size).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def inputs(sizes, tokens=9, top_k=2, num_experts=5):
    """Some slots are foreign."""
    return torch.randn(tokens, sizes[0]), torch.randint(-1, num_experts + 1, (tokens, top_k)), torch.rand(tokens, top_k)


def forward(experts: Experts, states, index, weights, config=TALL) -> torch.Tensor:
    routing = route(index, experts.num_experts, config.block_m)
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    a, _ = gate_up(states, experts.gate_up_proj, biases[0], routing, config, experts.activation)
    return combine(down(a, experts.down_proj, biases[1], routing, config), weights, routing)


@pytest.mark.parametrize("config", [TALL, SWAPPED], ids=["tall", "swapped"])
@pytest.mark.parametrize("sizes", [ALIGNED, MISALIGNED], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_the_three_kernels_give_what_eager_gives(config, sizes, activation, bias):
    experts, given = make(sizes, bias=bias, activation=activation), inputs(sizes)
    torch.testing.assert_close(forward(experts, *given, config), eager_experts(experts, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["tile", "flat"])
@pytest.mark.parametrize("group_m", [1, 2, 16])
def test_every_schedule_and_order_of_tiles_gives_the_same(schedule, group_m):
    experts, given = make(ALIGNED, 2), inputs(ALIGNED, tokens=40, num_experts=2)
    config = TileConfig(16, 32, 32, 4, 2, group_m=group_m, schedule=schedule)
    torch.testing.assert_close(forward(experts, *given, config), eager_experts(experts, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TALL, SWAPPED], ids=["tall", "swapped"])
def test_z_is_what_the_activation_is_of(config):
    experts, (states, index, _) = make(ALIGNED, bias=True), inputs(ALIGNED)
    routing = route(index, 5, 16)
    a, z = gate_up(
        states, experts.gate_up_proj, experts.gate_up_proj_bias, routing, config, experts.activation, save_z=True
    )
    ours = int(routing.offsets[-1])
    slots = routing.order[:ours].long()
    ids = index.flatten()[slots]
    rows = states[slots // 2].unsqueeze(-1)
    expected = (experts.gate_up_proj[ids] @ rows).squeeze(-1) + experts.gate_up_proj_bias[ids]
    torch.testing.assert_close(z[:ours], expected, rtol=1e-5, atol=1e-5)
    gate, up = expected.chunk(2, dim=-1)
    torch.testing.assert_close(a[:ours], gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TALL, SWAPPED], ids=["tall", "swapped"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_one_hot_expert_and_empty_ones(config, tokens):
    experts, (states, _, weights) = make(ALIGNED), inputs(ALIGNED, tokens)
    given = states, torch.full((tokens, 2), 3), weights
    torch.testing.assert_close(forward(experts, *given, config), eager_experts(experts, *given), rtol=1e-5, atol=1e-5)


def poison(routing: Routing, rows: torch.Tensor, value: float) -> None:
    rows[int(routing.offsets[-1]) :] = value


@pytest.mark.parametrize("config", [TALL, SWAPPED], ids=["tall", "swapped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_nobody_owns_are_never_read(config, value):
    experts, (states, index, weights) = make(ALIGNED), inputs(ALIGNED)
    index[2], states[2], weights[2] = -1, value, value
    routing = route(index, 5, 16)
    a, _ = gate_up(states, experts.gate_up_proj, None, routing, config, experts.activation)
    poison(routing, a, value)
    y = down(a, experts.down_proj, None, routing, config)
    poison(routing, y, value)
    out = combine(y, weights, routing)
    assert out[2].eq(0).all()
    torch.testing.assert_close(out, eager_experts(experts, states, index, weights), rtol=1e-5, atol=1e-5)


def test_combine_reads_weights_of_any_strides_and_dtype():
    routing, y = route(torch.tensor([[0, 1], [1, 0]]), 2, 16), torch.randn(4, 72)
    weights = torch.tensor([[0.5, 0.25], [2.0, -1.0]])
    slots = y[routing.inverse.long()].view(2, 2, 72)
    expected = (slots * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(combine(y, weights.t().contiguous().t().double(), routing), expected)


def test_tiles_of_another_height_are_refused():
    experts, (states, index, _) = make(ALIGNED), inputs(ALIGNED)
    with pytest.raises(ArgumentError, match="block_m"):
        gate_up(states, experts.gate_up_proj, None, route(index, 5, 32), TALL, experts.activation)


def test_every_operand_that_is_not_contiguous_is_named():
    experts, (states, index, _) = make(ALIGNED), inputs(ALIGNED)
    strided = states.t().contiguous().t()
    with pytest.raises(ArgumentError, match=r"(?s)x.*gate_up_proj"):
        gate_up(strided, experts.gate_up_proj.mT.contiguous().mT, None, route(index, 5, 16), TALL, experts.activation)


@pytest.mark.parametrize(("able", "tokens", "expected"), [(True, 64, True), (True, 65, False), (False, 64, False)])
def test_kernels_overlap_where_they_can_and_an_expert_has_few_rows(monkeypatch, able, tokens, expected):
    monkeypatch.setattr(operands, "can_overlap", lambda device: able)
    routing = route(torch.zeros(tokens, 2, dtype=torch.long), 2, 16)
    assert operands.overlapping(torch.device("cpu"), routing)["OVERLAP"] == expected
