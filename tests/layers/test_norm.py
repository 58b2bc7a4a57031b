"""RMS normalisation: its rounding, and its gradient by hand."""

import pytest
import torch

from moebius.config import RmsNorm
from moebius.layers.norm import RmsNormLayer, rms_norm


def layer(width: int = 24, scale_in_float32: bool = False) -> RmsNormLayer:
    norm = RmsNormLayer(RmsNorm(1e-5, scale_in_float32), width)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(width, generator=torch.Generator().manual_seed(0)))
    return norm


def by_steps(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def test_bfloat16_is_cast_before_the_weight_and_bit_equal_to_the_steps():
    norm, x = layer().bfloat16(), torch.randn(500, 24).bfloat16()
    expected = by_steps(x, norm.weight, 1e-5)
    assert torch.equal(norm(x), expected)
    fused = torch.nn.functional.rms_norm(x, (24,), norm.weight, 1e-5)
    assert not torch.equal(fused, expected)  # what a fused weight would round otherwise


@pytest.mark.parametrize("width", [24, 77, 2880])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_in_float32_it_is_cast_last_and_bit_equal_to_the_oracle(width, dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    norm, x = layer(width, scale_in_float32=True).to(dtype), 3 * torch.randn(100, width).to(dtype)
    oracle = GptOssRMSNorm(width, 1e-5).to(dtype)
    oracle.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), oracle(x))
    assert not torch.equal(norm(x), rms_norm(x, norm.weight, 1e-5))


def test_in_float32_both_orders_are_one():
    x = torch.randn(50, 24)
    assert torch.equal(layer()(x), layer(scale_in_float32=True)(x))


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 5, 24)])
def test_float32_equals_the_plain_form_with_all_gradients(shape):
    norm = layer()
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    inputs = [x, norm.weight]
    found = torch.autograd.grad(norm(x), inputs, grad)
    expected = torch.autograd.grad(rms_norm(x, norm.weight, norm.eps), inputs, grad)
    torch.testing.assert_close(norm(x), by_steps(x, norm.weight, 1e-5))
    torch.testing.assert_close(found, expected)


def test_epsilon_counts_where_values_are_small():
    x = torch.full((1, 24), 1e-4)
    assert layer()(x).abs().max() < 0.1
