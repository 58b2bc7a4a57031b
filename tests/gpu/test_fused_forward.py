"""On a CUDA device: the kernels of the fused forward give what eager gives, in bfloat16 as near to float32 as
grouped_mm, for every tile of the tables.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import copy

import pytest
import torch

from moebius.config import Activation, ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, Experts

pytest.importorskip("triton")
from moebius.experts.fused import tuning
from moebius.experts.fused.forward import combine, down, gate_up
from moebius.experts.fused.routing import route
from moebius.experts.fused.tuning import ForwardTiles, TileConfig, forward_tiles, tiles_of

pytestmark = pytest.mark.gpu

ACTIVATIONS = (SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7))


def make(sizes, num_experts=16, *, bias=False, activation: Activation = ACTIVATIONS[0]) -> Experts:
    torch.manual_seed(0)
    config = SparseMoe(num_experts, 1, sizes[1], SoftmaxTopK(renormalize=True), activation, bias=bias)
    with torch.device("cuda"):
        experts = Experts(config, sizes[0]).requires_grad_(False).bfloat16()
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def inputs(sizes, tokens=130, top_k=3, num_experts=16) -> tuple[torch.Tensor, ...]:
    """Two experts stay empty, some slots are foreign, and what only they would read is not a number."""
    index = torch.rand(tokens, num_experts, device="cuda")[:, : max(num_experts - 2, top_k)].topk(top_k).indices
    states, weights = torch.randn(tokens, sizes[0], device="cuda").bfloat16(), torch.rand(tokens, top_k, device="cuda")
    if tokens > 8:
        index[:4], index[7, 1] = -1, num_experts
        states[:4], weights[:4] = torch.nan, torch.nan
    return states, index, weights


def forward(experts: Experts, states, index, weights, tiles: ForwardTiles) -> torch.Tensor:
    routing = route(index, experts.num_experts, tiles.block_m)
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    a, _ = gate_up(states, experts.gate_up_proj, biases[0], routing, tiles.gate_up, experts.activation)
    return combine(down(a, experts.down_proj, biases[1], routing, tiles.down), weights, routing)


def wide(experts: Experts) -> Experts:
    return copy.deepcopy(experts).float()


def assert_as_near_as_grouped_mm(experts: Experts, given, tiles: ForwardTiles) -> None:
    states, index, weights = given
    exact = ALL_EXPERTS_FUNCTIONS["eager"](wide(experts), states.float(), index, weights)
    judge = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, states, index, weights)
    found = forward(experts, states, index, weights, tiles)
    assert found.isfinite().all()
    assert (found - exact).norm() <= 1.1 * (judge - exact).norm() + 1e-6


def table_tiles() -> list[ForwardTiles]:
    name = tuning.table_name(torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm90"
    return list(dict.fromkeys(map(tiles_of, tuning.table(name))))


@pytest.mark.parametrize("tiles", table_tiles(), ids=str)
@pytest.mark.parametrize("sizes", [(256, 128), (704, 200), (2880, 1408)], ids=str)
def test_every_tile_of_the_table(tiles, sizes):
    assert_as_near_as_grouped_mm(make(sizes), inputs(sizes, 700), tiles)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tokens", [1, 17, 130, 3000])
def test_every_layer_at_every_number_of_tokens(activation, bias, tokens):
    experts = make((72, 40), bias=bias, activation=activation)
    tiles = forward_tiles(torch.cuda.get_device_capability(), 72, 40, tokens * 3 / 16)
    assert_as_near_as_grouped_mm(experts, inputs((72, 40), tokens), tiles)


def test_programs_that_take_items_in_turn_give_the_bits_of_a_program_a_tile():
    experts, given = make((512, 256)), inputs((512, 256), 3000)
    gate_up_tile, plain = TileConfig(128, 64, 64, 4, 3), TileConfig(128, 128, 64, 4, 3)
    other = TileConfig(128, 128, 64, 4, 3, schedule="flat")
    found = [forward(experts, *given, ForwardTiles(gate_up_tile, tile)) for tile in (plain, other)]
    assert torch.equal(*found)


def test_rows_that_no_descriptor_may_read():
    """Rows of 70 and 38 numbers of 2 bytes are no multiples of 16 bytes: read by addresses."""
    experts, (states, index, weights) = make((70, 38)), inputs((70, 38))
    exact = ALL_EXPERTS_FUNCTIONS["eager"](wide(experts), states.float(), index, weights)
    for tiles in table_tiles():
        torch.testing.assert_close(
            forward(experts, states, index, weights, tiles).float(), exact, rtol=0.05, atol=0.05
        )  # fmt: skip


def test_an_expert_beyond_two_to_the_31st_element():
    experts = make((4096, 2048), num_experts=160)
    assert experts.gate_up_proj.numel() > 2**31
    index = torch.tensor([[159, 0], [158, 159]], device="cuda")
    states, weights = torch.randn(2, 4096, device="cuda").bfloat16(), torch.rand(2, 2, device="cuda")
    expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, states, index, weights)
    for tiles in table_tiles():
        torch.testing.assert_close(forward(experts, states, index, weights, tiles), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [5, 130, 3000])
def test_a_captured_graph_follows_the_routing(tokens):
    experts, (states, index, weights) = make((256, 128)), inputs((256, 128), tokens)
    tiles = forward_tiles(torch.cuda.get_device_capability(), 256, 128, tokens * 3 / 16)
    forward(experts, states, index, weights, tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(experts, states, index, weights, tiles)
    for seed in range(3):
        torch.manual_seed(seed)
        index.copy_(torch.rand(tokens, 16, device="cuda").topk(3).indices)
        states.normal_()
        weights.uniform_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, forward(experts, states, index, weights, tiles))


@pytest.mark.parametrize("tokens", [1, 130, 700, 40_000])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (160, 6)])
def test_routing_is_a_stable_sort(tokens, num_experts, top_k):
    index = torch.randint(-1, num_experts + 1, (tokens, top_k), device="cuda")
    found = route(index, num_experts, 64)
    ids = index.flatten().where((index >= 0).flatten() & (index < num_experts).flatten(), num_experts)
    sorted_ids, order = ids.sort(stable=True)
    assert torch.equal(found.order.long(), order)
    assert torch.equal(found.inverse.long()[order], torch.arange(len(ids), device="cuda"))
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device="cuda"))
    assert torch.equal(found.offsets.long(), ends)
    tiles = (ends.diff() + 63) // 64
    listed = torch.arange(num_experts, device="cuda").repeat_interleave(tiles)
    assert found.num_tiles.item() == len(listed)
    assert torch.equal(found.tile_expert[: len(listed)].long(), listed)
    assert found.tile_expert[len(listed) :].eq(-1).all()
