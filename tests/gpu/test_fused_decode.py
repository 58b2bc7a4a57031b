"""On a CUDA device: the kernels for a handful of tokens and those of quantized experts, against eager in float32.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import copy

import pytest
import torch

pytest.importorskip("triton")

from moebius.config import Activation, ClampedSwiGLU, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.eager import eager_experts
from moebius.experts.fused.decode import DecodeTiles, decode_down, decode_experts, decode_gate_up
from moebius.experts.fused.forward import combine
from moebius.experts.fused.quantized import (
    decoded,
    quantized_down,
    quantized_gate_up,
    quantized_input_gradient,
    quantized_tiles,
)
from moebius.experts.fused.routing import route
from moebius.experts.interface import Experts
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

pytestmark = pytest.mark.gpu

EXPERTS = 16
SEGMENTS = {"gate_up_proj": 2, "down_proj": 1}
HELD = [Int8(), BlockFp8(), BlockFp8((48, 40)), BlockFp8(scale_dtype="float8_e8m0fnu"), PackedInt4(), Mxfp4()]
ODD = [None, Int8(), BlockFp8((48, 40)), PackedInt4(8)]  # forms that take widths of 72 and 40
ACTIVATIONS = [SwiGLU(), ClampedSwiGLU(alpha=1.7, limit=0.7)]


def layers(form: Form | None, hidden: int, width: int, activation: Activation, bias: bool) -> tuple[Experts, Experts]:
    """bfloat16, held in the form, and float32 of the same numbers."""
    torch.manual_seed(0)
    config = SparseMoe(EXPERTS, 1, width, SoftmaxTopK(renormalize=True), activation, bias=bias)
    held = Experts(config, hidden).cuda().requires_grad_(False)
    for parameter in held.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5).copy_(parameter.bfloat16())
    exact = copy.deepcopy(held)
    for name, segments in SEGMENTS.items() if form else ():
        values, scales = quantize(form, held.get_parameter(name), segments)
        held.hold(name, form)
        held.get_parameter(name).copy_(values)
        held.get_parameter(f"{name}_scale").copy_(scales)
        exact.get_parameter(name).copy_(dequantize(form, values, scales, torch.float32, segments))
    return held.bfloat16(), exact


def inputs(tokens: int, top_k: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """Some slots are foreign, and one token has no other."""
    index = torch.rand(tokens, EXPERTS, device="cuda").topk(top_k).indices
    index[0, 0], index[-1] = EXPERTS, -1
    states, weights = torch.randn(tokens, hidden, device="cuda").bfloat16(), torch.rand(tokens, top_k, device="cuda")
    return states, index, weights


def sorted_experts(experts: Experts, states, index, weights) -> torch.Tensor:
    form, tiles = experts.gate_up_proj_form, quantized_tiles(index.numel() / EXPERTS)
    routing = route(index, EXPERTS, tiles.block_m)
    up = experts.gate_up_proj, form, experts.gate_up_proj_scale, experts.gate_up_proj_bias
    down = experts.down_proj, form, experts.down_proj_scale, experts.down_proj_bias
    a, _ = quantized_gate_up(states, *up, routing, tiles.gate_up, experts.activation)
    return combine(quantized_down(a, *down, routing, tiles.down), weights, routing)


def assert_near(run, held: Experts, exact: Experts, states, index, weights) -> None:
    found, expected = run(held, states, index, weights), eager_experts(exact, states.float(), index, weights)
    assert (found.float() - expected).norm() <= 6e-3 * expected.norm()  # a few roundings to bfloat16
    assert not found[-1].any()
    assert torch.equal(found, run(held, states, index, weights))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("form", [None, *HELD], ids=repr)
def test_a_handful_of_tokens(form, activation, bias):
    held, exact = layers(form, 1280, 704, activation, bias)
    for tokens, top_k in ((2, 1), (3, 4), (8, 3)):
        assert_near(decode_experts, held, exact, *inputs(tokens, top_k, 1280))


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    ("form", "block"), [(Int8(), 512), (Int8(), 256), (PackedInt4(128), 1024), (PackedInt4(32), 256)], ids=repr
)
def test_a_handful_of_tokens_by_matrix_instructions(form, block, bias, stages):
    held, exact = layers(form, 1280, 640, SwiGLU(), bias)
    tiles = DecodeTiles(8, block, 1, stages, overlap=False, dot=True)

    def run(experts, states, index, weights):
        return decode_down(experts, decode_gate_up(experts, states, index, tiles), index, weights, tiles)

    for tokens, top_k in ((2, 1), (3, 4), (8, 3)):
        assert_near(run, held, exact, *inputs(tokens, top_k, 1280))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("form", HELD, ids=repr)
def test_many_tokens_with_quantized_weights(form, activation, bias):
    held, exact = layers(form, 1280, 704, activation, bias)
    for tokens, top_k in ((2, 1), (40, 4), (150, 4), (700, 4), (3000, 2)):
        assert_near(sorted_experts, held, exact, *inputs(tokens, top_k, 1280))


@pytest.mark.parametrize("projection", list(SEGMENTS))
@pytest.mark.parametrize("form", HELD, ids=repr)
def test_decoded_matrices_and_products_backwards(form, projection):
    held, exact = layers(form, 1280, 704, SwiGLU(), False)
    values, scales = held.get_parameter(projection), held.get_parameter(f"{projection}_scale")
    matrices = exact.get_parameter(projection)
    assert torch.equal(decoded(projection, values, form, scales, torch.bfloat16), matrices.bfloat16())
    routing = route(torch.randint(-1, EXPERTS + 1, (333, 2), device="cuda"), EXPERTS, 64)
    rows = torch.randn(666, matrices.shape[1], device="cuda").bfloat16()
    expected, ends = torch.zeros(666, matrices.shape[2], device="cuda"), routing.offsets.tolist()
    for expert in range(EXPERTS):
        place = slice(ends[expert], ends[expert + 1])
        expected[place] = rows[place].float() @ matrices[expert]
    found = quantized_input_gradient(rows, projection, values, form, scales, routing.offsets)
    assert (found.float() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("form", ODD, ids=repr)
def test_odd_sizes(form):
    held, exact = layers(form, 72, 40, SwiGLU(), True)
    assert_near(decode_experts, held, exact, *inputs(3, 2, 72))
    if form is not None:
        assert_near(sorted_experts, held, exact, *inputs(90, 2, 72))


@pytest.mark.parametrize("form", [None, Int8(), PackedInt4()], ids=repr)
def test_a_graph_replays_with_other_tokens_and_routing(form):
    held, exact = layers(form, 512, 256, SwiGLU(), False)
    states, index, weights = inputs(4, 2, 512)
    decode_experts(held, states, index, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_experts(held, states, index, weights)
    for _ in range(3):
        for tensor, other in zip((states, index, weights), inputs(4, 2, 512), strict=True):
            tensor.copy_(other)
        graph.replay()
        expected = eager_experts(exact, states.float(), index, weights)
        assert (found.float() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_device_is_never_waited_for():
    held, _ = layers(PackedInt4(), 512, 256, SwiGLU(), False)
    tensors = inputs(4, 2, 512)
    decode_experts(held, *tensors), sorted_experts(held, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_experts(held, *tensors), sorted_experts(held, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
