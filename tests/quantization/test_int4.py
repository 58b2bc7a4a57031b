"""Packed int4: eight codes a word, q = code - 8, times the scale of their group."""

import pytest
import torch

from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import PackedInt4
from tests.quantization.formats import nibble


def random_values(form: PackedInt4, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, form.values(shape).shape, generator=generator).int()
    scales = torch.rand(form.scales(shape).shape, generator=generator) + 0.5
    return words, scales.to(getattr(torch, form.scale_dtype))


def codes_of(words: torch.Tensor) -> list[int]:
    unsigned = [word % 2**32 for word in words.flatten().tolist()]
    return [nibble(unsigned, i, bits=32) for i in range(8 * len(unsigned))]


@pytest.mark.parametrize("form", [PackedInt4(), PackedInt4(16, "float32"), PackedInt4(8, "float16")])
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_a_weight_is_its_codes_less_eight_times_the_scales_of_their_groups(form, lead):
    words, scales = random_values(form, *lead, 64)
    found = dequantize(form, words, scales, torch.float64)
    assert found.shape == (*lead, 64)
    each = scales.float().flatten().tolist()
    wanted = [(code - 8) * each[i // form.group_size] for i, code in enumerate(codes_of(words))]
    assert found.flatten().tolist() == torch.tensor(wanted, dtype=torch.float64).float().tolist()


def test_the_lowest_nibble_comes_first():
    words = torch.tensor([[0x76543210, 0x7EDCBA98 - 2**32 + 0x80000000]]).int()
    found = dequantize(PackedInt4(16, "float32"), words, torch.ones(1, 1), torch.float32)
    assert found.tolist() == [[float(q) for q in range(-8, 8)]]


def test_packing_what_was_unpacked_gives_the_same_bytes():
    form = PackedInt4()
    words, scales = random_values(form, 3, 20, 64)
    words[..., ::8] = words[..., ::8] & ~0xFF | 0xF0  # a group's scale shows in its 7 or its -8: codes 15 and 0
    weight = dequantize(form, words, scales, torch.float32)
    packed, packed_scales = quantize(form, weight)
    assert set(codes_of(packed)) == set(range(16))
    assert torch.equal(packed, words)
    assert torch.equal(packed_scales, scales)


@pytest.mark.parametrize(("extreme", "scale"), [(7.0, 1.0), (-8.0, 1.0), (-7.0, 0.875)])
def test_the_scale_takes_the_largest_to_seven_and_the_lowest_to_minus_eight(extreme, scale):
    weight = torch.zeros(1, 32)
    weight[0, 9] = extreme
    _, scales = quantize(PackedInt4(), weight)
    assert scales == scale


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_to_the_nearest_code_of_the_scale_that_is_kept(scale_dtype):
    weight = torch.randn(64, 64)
    values, scales = quantize(PackedInt4(scale_dtype=scale_dtype), weight)
    steps = scales.float().unsqueeze(-1)
    numbers, found = weight.unflatten(-1, (-1, 32)), torch.tensor(codes_of(values)).view(64, 2, 32) - 8
    candidates = torch.arange(-8, 8).view(16, 1, 1, 1) * steps
    assert torch.equal((found * steps - numbers).abs(), (candidates - numbers).abs().amin(dim=0))


def test_a_group_of_zeros_is_zeros_and_one_that_is_not_finite_does_not_pass_for_numbers():
    weight = torch.zeros(1, 96)
    weight[0, 33], weight[0, 70] = torch.nan, torch.inf
    values, scales = quantize(PackedInt4(), weight)
    found = dequantize(PackedInt4(), values, scales, torch.float32)
    assert scales[0, 0] == 1
    assert found[0, :32].eq(0).all()
    assert not found[0, 33].isfinite()
    assert not found[0, 70].isfinite()
