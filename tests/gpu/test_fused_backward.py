"""On a CUDA device: the fused backend's gradients on the real kernels, under torch.compile and in CUDA graphs."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("the fused kernels take compute capability 8.0 and later", allow_module_level=True)

from moebius.config import ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.eager import eager_experts
from moebius.experts.fused import passes
from moebius.experts.fused.backward_tiles import LARGE, OLDER, SMALL
from moebius.experts.fused.launch import fused_experts
from moebius.experts.grouped_mm import grouped_mm_experts
from moebius.experts.interface import Experts
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXPERTS, TOP_K = 12, 3
CLAMPED = ClampedSwiGLU(alpha=1.702, limit=1.0)
SHAPES = [(256, 192), (2048, 768), (2880, 704), (72, 40), (200, 88)]  # the last two: no bulk copies, odd tails
SEGMENTS = {"gate_up_proj": 2, "down_proj": 1}


def make(hidden=256, width=192, *, tokens=400, bias=False, activation=None, dtype=torch.bfloat16, num_experts=EXPERTS):
    """Two experts stay empty; some slots are foreign, and what stands in their rows is NaN."""
    torch.manual_seed(0)
    config = SparseMoe(num_experts, TOP_K, width, SoftmaxTopK(renormalize=True), activation or SwiGLU(), bias=bias)
    experts = Experts(config, hidden)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    index = torch.rand(tokens, num_experts - 2).topk(TOP_K).indices
    index[:4], index[7, 1] = -1, num_experts
    states, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, TOP_K)
    states[:4], weights[:4] = torch.nan, torch.nan
    return experts.to("cuda", dtype), (states.cuda(), index.cuda(), weights.cuda())


def run(function, experts, states, index, weights, **options) -> dict[str, torch.Tensor]:
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = function(experts, states, index, weights, **options)
    grad = torch.randn(output.shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda").bfloat16()
    trained = {name: each for name, each in experts.named_parameters() if each.requires_grad}
    leaves = {"hidden_states": states, "top_k_weights": weights, **trained}
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    return {"output": output, **dict(zip(leaves, grads, strict=True))}


def assert_as_near_as(judge_function, bound, experts, states, index, weights, **options) -> None:
    """Within bound times the judge's distance to eager in float32."""
    judge = run(judge_function, experts, states, index, weights)
    found = run(fused_experts, experts, states, index, weights, **options)
    exact = run(eager_experts, experts.float(), states.float(), index, weights)
    for what, value in exact.items():
        ours, theirs = (found[what] - value).norm(), (judge[what] - value).norm()
        assert ours <= bound * theirs + 1e-6, f"{what}: {ours:.3g}, the judge {theirs:.3g}, of {value.norm():.3g}"


@pytest.fixture(params=[LARGE, SMALL, OLDER], ids=["large", "small", "older"])
def tiles(request, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9 and request.param is not OLDER:
        pytest.skip("tiles of another card")
    monkeypatch.setattr(passes, "backward_tiles", lambda capability, rows_per_expert: request.param)


@pytest.mark.parametrize("activation", [SwiGLU(), CLAMPED], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(("hidden", "width"), SHAPES[:3])
def test_gradients_are_as_near_to_float32_as_those_of_grouped_mm(tiles, hidden, width, activation):
    experts, given = make(hidden, width, activation=activation)
    assert_as_near_as(grouped_mm_experts, 1.1, experts, *given)


@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_with_biases_and_odd_sizes_gradients_are_as_near_as_those_of_eager(tiles, hidden, width):
    experts, given = make(hidden, width, bias=True, activation=CLAMPED)
    assert_as_near_as(eager_experts, 1.1, experts, *given)


@pytest.mark.parametrize("tokens", [1, 3, 17, 130, 3000])
def test_any_number_of_tokens(tokens):
    experts, (states, index, weights) = make(tokens=max(tokens, 8))
    given = [tensor[-tokens:] for tensor in (states, index, weights)]
    assert_as_near_as(eager_experts, 1.1, experts, *given)


def test_float16():
    experts, given = make(dtype=torch.float16)
    assert_as_near_as(eager_experts, 1.1, experts, *given)


@pytest.mark.parametrize("hot", [0, EXPERTS - 1])
def test_all_rows_on_one_expert(tiles, hot):
    experts, (states, index, weights) = make()
    assert_as_near_as(grouped_mm_experts, 1.1, experts, states[4:], torch.full_like(index[4:], hot), weights[4:])


def test_all_ids_foreign_give_zeros():
    experts, (states, index, weights) = make(bias=True)
    found = run(fused_experts, experts, states, torch.full_like(index, -1), weights)
    assert all(value.eq(0).all() for value in found.values())


def test_no_tokens():
    experts, given = make(bias=True)
    found = run(fused_experts, experts, *(tensor[:0] for tensor in given))
    assert found["output"].shape == (0, 256)
    assert all(value.eq(0).all() for value in found.values())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_device_is_never_waited_for_and_bits_repeat_over_poisoned_memory():
    experts, given = make(bias=True, tokens=3000)
    first = run(fused_experts, experts, *given)
    torch.cuda.empty_cache()
    poison = torch.full((64 << 20,), torch.nan, device="cuda")
    del poison
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(fused_experts, experts, *given)
        recomputed = run(fused_experts, experts, *given, recompute=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[what], second[what]) for what in first)
    assert all(torch.equal(first[what], recomputed[what]) for what in first)


def test_recompute_keeps_less():
    experts, (states, index, weights) = make(tokens=4000, hidden=128, width=1024)
    kept = []
    for recompute in (False, True):
        before = torch.cuda.memory_allocated()
        output = fused_experts(experts, states, index, weights, recompute=recompute)
        kept.append(torch.cuda.memory_allocated() - before)
        del output
    assert kept[0] - kept[1] > 0.95 * index.numel() * 2 * 1024 * 2


class Block(torch.nn.Module):
    def __init__(self, experts, function):
        super().__init__()
        self.experts = experts
        self.function = function
        self.scale = torch.nn.Parameter(torch.ones((), device="cuda"))

    def forward(self, states, index, weights):
        return torch.tanh(self.function(self.experts, states * self.scale.to(states.dtype), index, weights))


def test_under_torch_compile_a_module_is_as_near_to_float32_as_in_steps():
    """Not equal: the compiler keeps in float32 what the steps around the experts round to bfloat16."""
    experts, (states, index, weights) = make(bias=True)
    states, index, weights = states[8:], index[8:], weights[8:]
    block = Block(experts, fused_experts)
    compiled = torch.compile(block, fullgraph=True)
    found, judge = (run_block(module, states, index, weights) for module in (compiled, block))
    exact = run_block(Block(experts.float(), eager_experts), states.float(), index, weights)
    for what, value in exact.items():
        ours, theirs = (found[what] - value).norm(), (judge[what] - value).norm()
        assert ours <= 1.1 * theirs + 1e-6, f"{what}: {ours:.3g}, in steps {theirs:.3g}, of {value.norm():.3g}"


def run_block(block, states, index, weights) -> dict[str, torch.Tensor]:
    return run(lambda _, *given: block(*given), block.experts, states, index, weights)


def test_a_cuda_graph_of_forward_and_backward_replays_with_other_routing():
    experts, (states, index, weights) = make(bias=True, tokens=600)
    states, index, weights = states[8:].requires_grad_(), index[8:].clone(), weights[8:].clone().requires_grad_()
    leaves, grad = [states, weights, *experts.parameters()], torch.randn_like(states)

    def step():
        output = fused_experts(experts, states, index, weights)
        return output, *torch.autograd.grad(output, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        index.copy_(torch.rand(len(index), EXPERTS, device="cuda").topk(TOP_K).indices)
        index[seed] = -1
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
    index.fill_(5)  # one hot expert: more tiles of it than at capture
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


@pytest.mark.parametrize("form", [Int8(), BlockFp8(), PackedInt4(), Mxfp4()], ids=lambda each: each.name)
def test_experts_in_quantized_forms_pass_gradients_to_states_and_routing_weights(form):
    experts, given = make(256, 128)
    experts.requires_grad_(False)
    for name, segments in SEGMENTS.items():
        values, scales = quantize(form, experts.get_parameter(name), segments)
        experts.hold(name, form)
        experts.get_parameter(name).copy_(values)
        experts.get_parameter(f"{name}_scale").copy_(scales)
    found, judge = (run(function, experts, *given) for function in (fused_experts, eager_experts))
    for what, value in judge.items():
        assert (found[what] - value).norm() <= 0.02 * value.norm(), what
