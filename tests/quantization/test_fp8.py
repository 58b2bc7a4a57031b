"""Block fp8: each value times its block's scale, partial blocks and stacked matrices included."""

import math

import pytest
import torch

from moebius.quantization.decoding import dequantize, quantize
from moebius.quantization.forms import BlockFp8
from tests.quantization.formats import e4m3, e8m0

E4M3_NAN = (0x7F, 0xFF)


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Finite e4m3 bytes."""
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return found.where((found & 0x7F) != 0x7F, 0x7E)


def random_scales(form: BlockFp8, shape, segments: int = 1) -> torch.Tensor:
    """In 1/8 ... 1, with few enough bits that seven times one is exact."""
    grid = form.scales(shape, segments).shape
    return torch.randint(128, 1024, grid, generator=torch.Generator().manual_seed(1)).float() / 1024


def expected(form: BlockFp8, values: torch.Tensor, scales: torch.Tensor, segments: int = 1) -> torch.Tensor:
    """[out, in] in float64, number by number."""
    (out, width), (rows, columns) = values.shape, form.block
    each, grid_rows = out // segments, scales.shape[0] // segments
    weight = torch.empty(out, width, dtype=torch.float64)
    for i in range(out):
        for j in range(width):
            scale = scales[i // each * grid_rows + i % each // rows, j // columns]
            weight[i, j] = e4m3(int(values[i, j])) * float(scale)
    return weight


def test_every_e4m3_byte_means_what_its_definition_says():
    form = BlockFp8((16, 16))
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    found = dequantize(form, values.view(torch.float8_e4m3fn), torch.full((1, 1), 0.75), torch.float32)
    for byte, number in enumerate(found.flatten().tolist()):
        wanted = e4m3(byte) * 0.75
        assert math.isnan(number) if math.isnan(wanted) else number == wanted
        assert math.isnan(wanted) or math.copysign(1, number) == math.copysign(1, wanted)


@pytest.mark.parametrize(
    ("shape", "block", "segments"),
    [
        ((8, 8), (4, 4), 1),
        ((9, 10), (4, 4), 1),  # partial blocks both ways
        ((3, 2), (4, 4), 1),  # less than one block
        ((12, 8), (4, 4), 2),  # segments of a block and a half
        ((12, 10), (4, 4), 3),
        ((10, 9), (2, 3), 2),
    ],
)
def test_a_weight_is_its_values_times_the_scales_of_their_blocks(shape, block, segments):
    form = BlockFp8(block)
    values, scales = random_bytes(*shape), random_scales(form, shape, segments)
    found = dequantize(form, values.view(torch.float8_e4m3fn), scales, torch.float32, segments)
    assert torch.equal(found, expected(form, values, scales, segments).float())


@pytest.mark.parametrize(
    ("shape", "segments", "grid"), [((576, 130), 1, (5, 2)), ((192, 64), 2, (2, 1)), ((384, 64), 2, (4, 1))]
)
def test_blocks_of_128_end_partial(shape, segments, grid):
    form = BlockFp8()
    values, scales = random_bytes(*shape), random_scales(form, shape, segments)
    assert scales.shape == grid
    found = dequantize(form, values.view(torch.float8_e4m3fn), scales, torch.float32, segments)
    for block_row in range(grid[0]):
        each, of_each = shape[0] // segments, grid[0] // segments
        first = block_row // of_each * each + block_row % of_each * 128
        last = min(first + 128, (block_row // of_each + 1) * each)
        for block_column in range(grid[1]):
            block = slice(first, last), slice(128 * block_column, 128 * block_column + 128)
            numbers = values[block].view(torch.float8_e4m3fn).float() * scales[block_row, block_column]
            assert torch.equal(found[block], numbers)


@pytest.mark.parametrize(("shape", "segments"), [((7, 10), 1), ((12, 9), 2), ((2, 3, 12, 9), 2)])
@pytest.mark.parametrize("scale_dtype", ["float32", "float8_e8m0fnu"])
def test_packing_what_was_unpacked_gives_the_same_bytes(shape, segments, scale_dtype):
    form = BlockFp8((4, 4), scale_dtype)
    values = random_bytes(*shape)
    scales = random_scales(form, shape, segments).to(getattr(torch, scale_dtype))
    values[..., ::2, ::2] = 0x7E  # every block reaches 448, which is what its scale is made from
    weight = dequantize(form, values.view(torch.float8_e4m3fn), scales, torch.float32, segments)
    packed, packed_scales = quantize(form, weight, segments)
    assert torch.equal(packed.view(torch.uint8), values)
    assert torch.equal(packed_scales.float(), scales.float())


def test_all_finite_bytes_survive_and_nan_stays_nan():
    form = BlockFp8((16, 16))
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight = dequantize(form, values.view(torch.float8_e4m3fn), torch.full((1, 1), 0.75), torch.float32)
    packed, scales = quantize(form, weight)
    finite = torch.tensor([byte not in E4M3_NAN for byte in range(256)]).view(16, 16)
    assert torch.equal(packed.view(torch.uint8)[finite], values[finite])
    assert packed.float()[~finite].isnan().all()
    assert scales == 0.75


def test_an_infinite_weight_becomes_nan_and_spoils_no_other():
    packed, scales = quantize(BlockFp8((4, 4)), torch.tensor([[0.875, torch.inf, -torch.inf, 0.5]]))
    assert packed.float().isnan().tolist() == [[False, True, True, False]]
    assert scales == 0.875 / 448


def test_a_block_of_zeros_has_scale_one_and_tiny_ones_stay_finite():
    weight = torch.zeros(4, 8)
    weight[0, 4] = 1e-44
    values, scales = quantize(BlockFp8((4, 4)), weight)
    assert scales[0, 0] == 1
    assert values.float().isfinite().all()
    assert values.view(torch.uint8)[:, :4].eq(0).all()


def test_scales_that_are_powers_of_two_take_nothing_beyond_448():
    form = BlockFp8((4, 4), "float8_e8m0fnu")
    weight = torch.randn(64, 64)
    values, scales = quantize(form, weight)
    assert scales.dtype == torch.float8_e8m0fnu
    largest = weight.unflatten(0, (-1, 4)).unflatten(-1, (-1, 4)).abs().amax(dim=(1, 3))
    exact = torch.tensor([e8m0(byte) for byte in scales.view(torch.uint8).flatten().tolist()]).view_as(largest)
    assert (largest / exact <= 448).all()
    assert (largest / exact > 224).all()
    found = dequantize(form, values, scales, torch.float32)
    assert torch.equal(found, values.float() * exact.repeat_interleave(4, 0).repeat_interleave(4, 1))


@pytest.mark.parametrize("byte", [0, 1, 127, 254])
def test_e8m0_scales_reach_their_extremes(byte):
    scales = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = torch.tensor([[1.0, -0.5]]).to(torch.float8_e4m3fn)
    found = dequantize(BlockFp8((4, 4), "float8_e8m0fnu"), values, scales, torch.float32)
    assert found.tolist() == [[e8m0(byte), -0.5 * e8m0(byte)]]


def test_numbers_are_rounded_to_the_nearest_e4m3():
    numbers = sorted({e4m3(byte) for byte in range(256) if byte not in E4M3_NAN})
    weight = torch.cat([torch.randn(500) * 50, torch.tensor([448.0, 0.0])]).clamp(-448, 448).view(1, -1)
    values, scales = quantize(BlockFp8((1, 512)), weight)
    assert scales == 1
    for wanted, found in zip(weight[0].tolist(), values[0].float().tolist(), strict=True):
        assert abs(found - wanted) == min(abs(number - wanted) for number in numbers)
