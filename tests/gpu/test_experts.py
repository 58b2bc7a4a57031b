"""On a CUDA device: grouped_mm, batched_mm and fused give what eager gives there, without waiting for the device."""

import pytest
import torch

from moebius.config import SoftmaxTopK, SparseMoe
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, Experts

pytestmark = pytest.mark.gpu

HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 64, 16, 3


def make(dtype: torch.dtype, *, bias: bool = True, tokens: int = 130) -> tuple[Experts, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    experts = Experts(SparseMoe(EXPERTS, TOP_K, WIDTH, SoftmaxTopK(renormalize=True), bias=bias), HIDDEN)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    index = torch.rand(tokens, EXPERTS - 2).topk(TOP_K).indices  # two experts stay empty
    index[:4], index[7, 1] = -1, EXPERTS
    states, weights = torch.randn(tokens, HIDDEN).to(dtype), torch.rand(tokens, TOP_K)
    states[:4], weights[:4] = torch.nan, torch.nan
    return experts.to("cuda", dtype), (states.cuda(), index.cuda(), weights.cuda())


def run(name: str, experts: Experts, states, index, weights) -> list[torch.Tensor]:
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = ALL_EXPERTS_FUNCTIONS[name](experts, states, index, weights)
    return [output, *torch.autograd.grad(output, [states, weights, *experts.parameters()], torch.ones_like(output))]


@pytest.mark.parametrize("name", ["batched_mm", "grouped_mm"])
def test_float32_equals_eager(name):
    experts, inputs = make(torch.float32)
    for found, expected in zip(run(name, experts, *inputs), run("eager", experts, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["grouped_mm", "fused"])
def test_bfloat16_is_as_near_to_float32_as_eager(name):
    """Without biases: a grouped product is rounded before its bias is added, a linear layer's after."""
    experts, (states, index, weights) = make(torch.bfloat16, bias=False)
    judge, found = (run(each, experts, states, index, weights) for each in ("eager", name))
    exact = run("eager", experts.float(), states.float(), index, weights)
    for ours, eager, value in zip(found, judge, exact, strict=True):
        assert (ours - value).norm() <= 1.1 * (eager - value).norm() + 1e-6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["batched_mm", "grouped_mm", "fused"])
def test_the_device_is_never_waited_for_and_bits_repeat(name):
    experts, inputs = make(torch.bfloat16)
    first = run(name, experts, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(name, experts, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    repeated = zip(first[:3], second[:3], strict=True)
    assert all(torch.equal(*pair) for pair in repeated)
