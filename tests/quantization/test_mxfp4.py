"""Mxfp4: codes, block exponents, and rounding as OCP MX v1.0 has them."""

import math

import pytest
import torch

from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import Mxfp4
from tests.quantization.formats import e2m1, e8m0, nibble

FORM = Mxfp4()


def random_values(*lead: int, blocks: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (*lead, blocks, 16), dtype=torch.uint8, generator=generator)
    return values, torch.randint(100, 150, (*lead, blocks), dtype=torch.uint8, generator=generator)


def test_every_code_in_either_nibble_means_what_its_definition_says():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    found = dequantize(FORM, values, torch.full((1, 16), 128, dtype=torch.uint8), torch.float32).flatten().tolist()
    for index, number in enumerate(found):
        wanted = 2 * e2m1(nibble(list(range(256)), index, bits=8))
        assert (number, math.copysign(1, number)) == (wanted, math.copysign(1, wanted))


@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)])
def test_a_weight_is_its_codes_times_the_powers_of_their_blocks(lead):
    values, scales = random_values(*lead)
    found = dequantize(FORM, values, scales, torch.float64)
    assert found.shape == (*lead, 64)
    for row, codes, exponents in zip(
        found.view(-1, 64).tolist(), values.view(-1, 32).tolist(), scales.view(-1, 2).tolist(), strict=True
    ):
        assert row == [e2m1(nibble(codes, i, bits=8)) * e8m0(exponents[i // 32]) for i in range(64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("byte", [0, 1, 127, 252])
def test_scale_exponents_reach_their_extremes(byte, dtype):
    values = torch.arange(16, dtype=torch.uint8).mul(17).view(1, 1, 16)
    found = dequantize(FORM, values, torch.tensor([[byte]], dtype=torch.uint8), dtype)
    assert found.tolist() == [[e2m1(i // 2) * e8m0(byte) for i in range(32)]]


def test_scale_255_is_nan_for_the_whole_block():
    values, _ = random_values(1)
    found = dequantize(FORM, values, torch.tensor([[255, 127]], dtype=torch.uint8), torch.float32)
    assert found.isnan().tolist() == [[True] * 32 + [False] * 32]


def test_packing_what_was_unpacked_gives_the_same_bytes():
    values, scales = random_values(3, 50, seed=3)
    values[..., 0] = values[..., 0] & 0xF0 | 6  # a block's exponent is that of its largest: at least one 4
    weight = dequantize(FORM, values, scales, torch.float32)
    packed, packed_scales = quantize(FORM, weight)
    assert set(nibbles_of(packed)) == set(range(16))
    assert torch.equal(packed, values)
    assert torch.equal(packed_scales, scales)


def nibbles_of(packed: torch.Tensor) -> list[int]:
    return [code for byte in packed.flatten().tolist() for code in (byte & 15, byte >> 4)]


def test_the_shared_exponent_is_that_of_the_largest_less_two():
    """Section 6.3, with emax = 2 for e2m1."""
    for largest in (1.0, 1.99, 2.0, 5.9, 7.9, 8.0, 1e-30, 3e38, 2.0**-125, 2.0**-126, 1e-42):
        weight = torch.zeros(1, 32)
        weight[0, 5] = -largest
        _, scales = quantize(FORM, weight)
        assert scales.item() == max(0, math.floor(math.log2(weight.abs().max().item())) - 2 + 127)


def test_numbers_are_rounded_to_the_nearest_code_ties_to_the_even_one_and_saturate():
    steps = torch.cat([torch.arange(0, 7.75, 1 / 64), torch.arange(0, -7.75, -1 / 64)]).view(-1, 31)
    weight = torch.cat([torch.full((len(steps), 1), 4.0), steps], dim=1)  # every block's scale is one
    packed, scales = quantize(FORM, weight)
    assert scales.eq(127).all()
    for number, found in zip(weight.flatten().tolist(), nibbles_of(packed), strict=True):
        distances = [(abs(abs(number) - e2m1(code)), code % 2, code) for code in range(8)]
        assert found & 7 == min(distances)[2], number
        assert found >> 3 == (number < 0), number


def test_a_block_that_is_not_finite_becomes_nan_and_zeros_stay_zeros():
    weight = torch.zeros(1, 96)
    weight[0, 3], weight[0, 40] = torch.nan, -torch.inf
    values, scales = quantize(FORM, weight)
    found = dequantize(FORM, values, scales, torch.float32)
    assert found[0, :64].isnan().all()
    assert found[0, 64:].eq(0).all()


def test_zeros_keep_their_sign():
    weight = torch.tensor([0.0, -0.0] * 15 + [4.0, 4.0]).view(1, 32)
    values, _ = quantize(FORM, weight)
    assert nibbles_of(values) == [0, 8] * 15 + [6, 6]
