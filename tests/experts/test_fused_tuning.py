"""Which tiles the fused forward takes, and that every entry of the tables is one that kernels can run."""

import pytest

from moebius.experts.fused import tuning
from moebius.experts.fused.tuning import TileConfig, forward_tiles, tiles_of

TABLES = ("sm90", "sm80")


def every_entry():
    return [
        pytest.param(name, entry, id=f"{name}-{place}")
        for name in TABLES
        for place, entry in enumerate(tuning.table(name))
    ]


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@pytest.mark.parametrize(("name", "entry"), every_entry())
def test_an_entry_has_blocks_that_kernels_take(name, entry):
    for tile in (tiles_of(entry).gate_up, tiles_of(entry).down):
        assert all(map(is_power_of_two, (tile.block_m, tile.block_n, tile.block_k, tile.warps)))
        assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
        assert max(tile.block_n, tile.block_k) <= 256  # a side of a descriptor's box
    assert tiles_of(entry).gate_up.schedule == "tile"


@pytest.mark.parametrize(("name", "entry"), every_entry())
def test_both_products_of_an_entry_share_their_rows(name, entry):
    assert tiles_of(entry).gate_up.block_m == tiles_of(entry).down.block_m == tiles_of(entry).block_m


@pytest.mark.parametrize("entry", tuning.table("sm90"), ids=str)
def test_on_hopper_one_side_of_each_product_has_the_64_rows_that_wgmma_takes(entry):
    for tile in (tiles_of(entry).gate_up, tiles_of(entry).down):
        assert (tile.block_n if tile.swapped else tile.block_m) >= 64


@pytest.mark.parametrize("entry", tuning.table("sm90"), ids=str)
def test_a_shape_of_the_table_takes_its_own_entry(entry):
    shape = entry["hidden_size"], entry["intermediate_size"]
    assert forward_tiles((9, 0), *shape, entry["rows_per_expert"]) == tiles_of(entry)


def test_more_rows_never_take_lower_tiles():
    heights = [forward_tiles((9, 0), 2048, 768, 2.0**power).block_m for power in range(-3, 14)]
    assert heights == sorted(heights)
    assert heights[0] == 16
    assert heights[-1] == 128


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm90"), ((12, 0), "sm80")],
)
def test_a_card_takes_the_table_whose_shared_memory_it_has(capability, table):
    assert tuning.table_name(capability) == table


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_a_height_may_be_asked_for(capability, block_m):
    tiles = forward_tiles(capability, 2880, 2880, 100, block_m)
    assert tiles.gate_up.block_m == tiles.down.block_m == block_m


def test_no_rows_at_all_take_the_lowest_tiles():
    assert forward_tiles((9, 0), 72, 40, 0).block_m == 16


def test_a_field_that_a_tile_does_not_have_is_an_error():
    with pytest.raises(TypeError, match="block_q"):
        TileConfig(16, 64, 64, 4, 3, block_q=1)
