"""Exchanges over NCCL, between two GPUs of this host (`make test-gpu`).

E experts, K experts a token, T tokens of a rank, H hidden.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moebius.config import SharedExpert, SoftmaxTopK, SparseMoe
from moebius.distributed.config import DistributedConfig
from moebius.distributed.exchange import EXCHANGES
from moebius.distributed.expert_parallel import ParallelExperts, parallel_experts
from moebius.distributed.layout import ExpertLayout
from moebius.distributed.ranks import Ranks
from moebius.errors import BackendError
from moebius.experts.interface import Experts
from moebius.layers.moe import SparseMoeBlock
from tests.distributed.exchanging import Inputs, cases
from tests.distributed.exchanging import distances as exchange_distances
from tests.distributed.pool import run_ranks
from tests.distributed.test_expert_parallel import distances as decoder_distances

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

E, K, H, WIDTH = 127, 8, 1024, 512
LAYER = SparseMoe(E, K, WIDTH, SoftmaxTopK(renormalize=True))
EXCHANGED = [name for name in EXCHANGES if name != "local"]
REPLAYS = 20


def on_two_gpus(function: Callable, *args) -> list:
    """The first call compiles kernels."""
    return run_ranks(2, function, *args, seconds=280, device="cuda")


def test_outputs_and_every_gradient_are_those_of_one_process():
    for found in on_two_gpus(exchange_distances, cases(2)):
        assert {case: of_case for case, of_case in found.items() if max(of_case.values()) > 1e-12} == {}


@pytest.mark.parametrize("batch", ["shared", "distinct"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_a_decoder_is_the_decoder_of_one_process(family, batch):
    for found in on_two_gpus(decoder_distances, batch, family, {}):
        assert {name: far for name, far in found.items() if far > 1e-4} == {}


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def random_layer() -> Experts:
    """All experts, in float32."""
    experts = Experts(LAYER, H)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return experts.bfloat16().float()  # of weights that both dtypes have


def random_inputs(tokens: int, seed: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    states, cotangent = (torch.randn(tokens, H, generator=generator).bfloat16().float() for _ in range(2))
    index = torch.rand(tokens, E, generator=generator).topk(K).indices
    return Inputs(states, index, torch.rand(tokens, K, generator=generator).softmax(dim=-1), cotangent)


def local_layer(ranks: Ranks, name: str, whole: Experts) -> ParallelExperts:
    exchange = EXCHANGES[name](ranks.experts, ExpertLayout(E, ranks.size))
    batch = "shared" if name == "all_reduce" else "distinct"
    experts = ParallelExperts(LAYER, H, ranks=ranks, batch=batch, exchange=exchange)
    with torch.no_grad():
        for own, parameter in experts.named_parameters():
            parameter.copy_(whole.get_parameter(own)[experts.held.start : experts.held.stop])
    return experts.to(ranks.device, torch.bfloat16)


def results(experts: Experts, given: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients, in float32."""
    states, weights = given.states.to(dtype).requires_grad_(), given.weights.clone().requires_grad_()
    output = experts(states, given.index, weights)
    leaves = {"states": states, "weights": weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad((output.float() * given.cotangent).sum(), list(leaves.values()))
    return {"output": output.detach().float(), **{n: g.float() for n, g in zip(leaves, grads, strict=True)}}


def errors(ranks: Ranks, name: str, tokens: int) -> dict[str, tuple[float, float]]:
    """Of each result's rows that this rank has: how far from float32 they are on ranks, and how far in one process."""
    shared = name == "all_reduce"
    whole, given = random_layer(), random_inputs(tokens if shared else 2 * tokens).to(ranks.device)
    first = 0 if shared else tokens * ranks.rank
    experts = local_layer(ranks, name, whole)
    found = results(experts, given.part(first, tokens), torch.bfloat16)
    whole.to(ranks.device).set_experts_implementation("eager")
    exact = results(whole, given, torch.float32)
    whole.bfloat16().set_experts_implementation("auto")
    alone = results(whole, given, torch.bfloat16)
    mine = dict.fromkeys(exact, (experts.held.start, len(experts.held)))
    mine |= dict.fromkeys(("output", "states", "weights"), (first, tokens))
    reference, one = ({each: of[each].narrow(0, *mine[each]) for each in exact} for of in (exact, alone))
    return {each: (relative(found[each], reference[each]), relative(one[each], reference[each])) for each in exact}


def relative(found: Tensor, exact: Tensor) -> float:
    """The error's norm by that of the exact result."""
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("name", EXCHANGED)
def test_bfloat16_loses_little_more_than_in_one_process(name, tokens):
    for found in on_two_gpus(errors, name, tokens):
        assert {each: far for each, (far, alone) in found.items() if far > 1.25 * alone} == {}


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the step, and what its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread asks for events meanwhile
        output = step()
    return graph, output


@torch.no_grad()
def replay_distance(ranks: Ranks, tokens: int) -> float:
    """The largest of 20 replays, each with another routing, against the layer in one process."""
    whole = random_layer()
    experts = local_layer(ranks, "all_reduce", whole)
    whole.to(ranks.device, torch.bfloat16)
    given = random_inputs(tokens).to(ranks.device)
    states, index, weights = given.states.bfloat16(), given.index.clone(), given.weights.clone()
    graph, output = captured(lambda: experts(states, index, weights))
    far = []
    for seed in range(REPLAYS):
        fresh = random_inputs(tokens, seed).to(ranks.device)
        for buffer, new in ((states, fresh.states), (index, fresh.index), (weights, fresh.weights)):
            buffer.copy_(new)
        graph.replay()
        far.append(relative(output, whole(states, index, weights)))
    torch.cuda.synchronize()
    return max(far)


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_graph_of_a_shared_decode_step_follows_changed_routing(tokens):
    assert max(on_two_gpus(replay_distance, tokens)) < 0.01


@torch.no_grad()
def captured_all_to_all(ranks: Ranks) -> str:
    experts, given = local_layer(ranks, "all_to_all", random_layer()), random_inputs(8, ranks.rank).to(ranks.device)
    step = partial(experts, given.states.bfloat16(), given.index, given.weights)
    step()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            step()
    except BackendError as error:
        return error.message
    return "captured"


def test_all_to_all_is_refused_in_a_graph():
    assert all("a CUDA graph cannot hold it" in found for found in on_two_gpus(captured_all_to_all))


# --- the shared expert beside the routed ones ------------------------------------------------------------------------

BLOCK = SparseMoe(E, K, WIDTH, SoftmaxTopK(renormalize=True), shared_expert=SharedExpert(WIDTH, gated=True))


def block(ranks: Ranks) -> SparseMoeBlock:
    made = SparseMoeBlock(
        BLOCK, H, make_experts=parallel_experts(ranks, DistributedConfig(ep_size=ranks.size, batch="shared"))
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            of_rank = generator if "experts." not in name else torch.Generator().manual_seed(ranks.rank)
            parameter.copy_(torch.randn(parameter.shape, generator=of_rank) / parameter.shape[-1] ** 0.5)
    return made.to(ranks.device, torch.bfloat16)


def block_results(made: SparseMoeBlock, states: Tensor) -> list[Tensor]:
    leaf = states.clone().requires_grad_()
    output, _ = made(leaf)
    return [output.detach(), *torch.autograd.grad(output.float().sin().sum(), [leaf, *made.parameters()])]


def side_by_side_distance(ranks: Ranks) -> float:
    """From the same in turn; the largest of many runs, because a missing wait is not missed every time."""
    made = block(ranks)
    assert made.experts.waits
    states = torch.randn(2, 300, H, generator=torch.Generator().manual_seed(6)).to(ranks.device, torch.bfloat16)
    beside = [block_results(made, states) for _ in range(REPLAYS)]
    made.experts.waits = False
    in_turn = block_results(made, states)
    return max(relative(*pair) for each in beside for pair in zip(each, in_turn, strict=True))


def test_the_shared_expert_beside_the_routed_ones_gives_what_it_gives_after_them():
    assert max(on_two_gpus(side_by_side_distance)) < 0.01


@torch.no_grad()
def replayed_block_distance(ranks: Ranks) -> float:
    made, far = block(ranks), []
    states = torch.zeros(4, 1, H, device=ranks.device, dtype=torch.bfloat16)
    graph, output = captured(lambda: made(states)[0])
    for seed in range(REPLAYS):
        states.copy_(torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        far.append(relative(output, made(states)[0]))
    return max(far)


def test_a_graph_holds_both_streams():
    assert max(on_two_gpus(replayed_block_distance)) < 0.01
