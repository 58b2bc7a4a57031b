"""What all forms have in common: shapes, one rounding, refusals, and memory."""

import pytest
import torch

from moebius.errors import ArgumentError
from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8, Form, Mxfp4, PackedInt4

FORMS = [Mxfp4(), BlockFp8(), BlockFp8((32, 64), "float8_e8m0fnu"), PackedInt4(), PackedInt4(64, "float16")]


def name(form: Form) -> str:
    return repr(form)


@pytest.mark.parametrize("form", FORMS, ids=name)
@pytest.mark.parametrize("shape", [(64, 128), (3, 64, 128), (2, 3, 40, 64), (0, 4, 64)])
def test_values_and_scales_have_the_shapes_and_dtypes_of_the_form(form, shape):
    values, scales = quantize(form, torch.randn(shape), segments=2)
    for tensor, spec in ((values, form.values(shape)), (scales, form.scales(shape, 2))):
        assert (tuple(tensor.shape), str(tensor.dtype)) == (spec.shape, f"torch.{spec.dtype}")
    assert dequantize(form, values, scales, torch.float32, segments=2).shape == shape


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_leading_axes_share_nothing(form):
    weight = torch.randn(3, 64, 128) * torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1)
    values, scales = quantize(form, weight)
    whole = dequantize(form, values, scales, torch.float32)
    for expert in range(3):
        own_values, own_scales = quantize(form, weight[expert])
        assert torch.equal(own_values.view(torch.uint8), values[expert].view(torch.uint8))
        assert torch.equal(whole[expert], dequantize(form, own_values, own_scales, torch.float32))


@pytest.mark.parametrize("form", FORMS, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_once(form, dtype):
    values, scales = quantize(form, torch.randn(64, 128))
    exact = dequantize(form, values, scales, torch.float32)
    assert torch.equal(dequantize(form, values, scales, dtype), exact.to(dtype))


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_a_weight_in_another_dtype_or_strided_packs_alike(form):
    weight = torch.randn(64, 128).bfloat16()
    expected = quantize(form, weight.float())
    for same in (weight, weight.t().contiguous().t()):
        for found, wanted in zip(quantize(form, same), expected, strict=True):
            assert found.is_contiguous()
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_the_weight_that_was_packed_is_left_alone(form):
    weight = torch.randn(64, 128)
    before = weight.clone()
    quantize(form, weight)
    assert torch.equal(weight, before)


def test_scales_of_another_grid_are_refused_with_both_layouts():
    values, scales = quantize(BlockFp8(), torch.randn(576, 256))
    with pytest.raises(ArgumentError, match=r"scales: layout: expected float32 \[5, 2\], found float32 \[4, 2\]"):
        dequantize(BlockFp8(), values, scales[:4], torch.float32)


def test_values_of_another_form_are_refused():
    values, scales = quantize(Mxfp4(), torch.randn(4, 64))
    with pytest.raises(ArgumentError) as raised:
        dequantize(Mxfp4(), values.view(torch.int8), scales.view(torch.float8_e8m0fnu), torch.float32)
    assert [fault.where for fault in raised.value.faults] == ["values", "scales"]


@pytest.mark.parametrize("form", [Mxfp4(), PackedInt4()], ids=name)
def test_a_width_of_no_whole_blocks_is_refused(form):
    with pytest.raises(ArgumentError, match="groups of 32; 40"):
        quantize(form, torch.randn(4, 40))


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_unpacking_needs_at_most_three_times_the_float32_weight(form):
    values, scales = quantize(form, torch.randn(512, 1024))
    with torch.profiler.profile(profile_memory=True) as profile:
        dequantize(form, values, scales, torch.bfloat16)
    held, peak = 0, 0
    for event in sorted(memory_events(profile), key=lambda each: each[0]):
        held += event[1]
        peak = max(peak, held)
    assert 4 * 512 * 1024 < peak <= 3 * 4 * 512 * 1024


def memory_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(when, bytes taken or given back) of every allocation."""
    events = profile.profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
