"""Int8: a row's integers times the row's scale."""

import pytest
import torch

from moebius.errors import ArgumentError
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import Int8


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_a_weight_is_its_integers_times_the_scale_of_their_row(lead, scale_dtype):
    values = torch.randint(-128, 128, (*lead, 5, 12), dtype=torch.int8)
    scales = torch.rand(*lead, 5, 1).to(getattr(torch, scale_dtype))
    found = dequantize(Int8(scale_dtype), values, scales, torch.float64)
    rows = zip(values.flatten(0, -2).tolist(), scales.flatten().tolist(), strict=True)
    wanted = [[q * scale for q in row] for row, scale in rows]
    assert found.flatten(0, -2).tolist() == torch.tensor(wanted, dtype=torch.float64).float().tolist()


def test_packing_what_was_unpacked_gives_the_same_bytes():
    values = torch.randint(-128, 128, (4, 6, 32), dtype=torch.int8)
    values[..., 0], values[:, ::2, 1] = 127, -128  # a row's scale shows in its 127 or its -128
    weight = dequantize(Int8(), values, torch.full((4, 6, 1), 0.25), torch.float32)
    packed, scales = quantize(Int8(), weight)
    assert torch.equal(packed, values)
    assert scales.eq(0.25).all()


@pytest.mark.parametrize(("extreme", "scale"), [(127.0, 1.0), (-128.0, 1.0), (-127.0, 127 / 128)])
def test_the_scale_takes_the_largest_to_127_and_the_lowest_to_minus_128(extreme, scale):
    weight = torch.zeros(1, 32)
    weight[0, 9] = extreme
    _, scales = quantize(Int8(), weight)
    assert scales == scale


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_to_the_nearest_integer_of_the_scale_that_is_kept(scale_dtype):
    weight = torch.randn(64, 48)
    values, scales = quantize(Int8(scale_dtype), weight)
    steps = scales.float()
    candidates = torch.arange(-128, 128).view(256, 1, 1) * steps
    assert torch.equal((values * steps - weight).abs(), (candidates - weight).abs().amin(dim=0))


def test_the_weight_that_is_packed_is_left_as_it_was():
    weight = torch.randn(4, 8)
    before = weight.clone()
    quantize(Int8(), weight)
    assert torch.equal(weight, before)


def test_a_row_of_zeros_is_zeros_and_one_that_is_not_finite_does_not_pass_for_numbers():
    weight = torch.zeros(3, 8)
    weight[1, 3], weight[2, 4] = torch.nan, torch.inf
    values, scales = quantize(Int8(), weight)
    found = dequantize(Int8(), values, scales, torch.float32)
    assert scales[0] == 1
    assert found[0].eq(0).all()
    assert not scales[1:].isfinite().any()


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ArgumentError, match=r"expected float32 \[4, 1\], found float32 \[4\]"):
        dequantize(Int8(), torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), torch.float32)
