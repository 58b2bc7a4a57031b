"""Which tiles the products of the backward pass take, by how many rows an expert has on average.  Pure choice."""

from dataclasses import dataclass

from moebius.experts.fused.tuning import TileConfig


@dataclass(frozen=True)
class BackwardTiles:
    """z_gradient and rows_gradient work on the tiles of one Routing: their block_m is one.

    In weight_gradient, block_m and block_n are the tile of an expert's matrix, block_k a step along its rows.
    """

    z_gradient: TileConfig
    rows_gradient: TileConfig
    weight_gradient: TileConfig

    @property
    def block_m(self) -> int:
        return self.z_gradient.block_m


# measured on an H200 at 256 and 1024 rows an expert; more warps finish z's tile under each other's loads, and smaller
# tiles of an expert's matrix leave room for programs that store while others multiply
LARGE = BackwardTiles(
    TileConfig(128, 256, 64, 16, 4, group_m=8),
    TileConfig(128, 256, 64, 8, 3, group_m=8),
    TileConfig(128, 128, 32, 4, 4, group_m=8),
)
SMALL = BackwardTiles(
    TileConfig(64, 128, 64, 4, 3, group_m=8),
    TileConfig(64, 256, 64, 4, 3, group_m=8),
    TileConfig(128, 128, 32, 4, 4, group_m=8),
)
# at most 99 KB of shared memory, which is what desktop cards have
OLDER = BackwardTiles(
    TileConfig(64, 128, 32, 4, 3, group_m=8),
    TileConfig(64, 128, 32, 4, 3, group_m=8),
    TileConfig(128, 128, 32, 8, 3, group_m=8),
)
SMALL_ROWS = 96
"""Up to so many rows an expert.  At few, tiles of 128 rows would be mostly padding."""


def backward_tiles(capability: tuple[int, int], rows_per_expert: float) -> BackwardTiles:
    """capability: of the device, as (9, 0).  rows_per_expert: S / E, and E counts empty experts too."""
    if capability[0] not in (9, 10):
        return OLDER
    return SMALL if rows_per_expert <= SMALL_ROWS else LARGE
