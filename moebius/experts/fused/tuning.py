"""Which tiles the sorted products take: measured tables, read by shape.  Nothing is tried at run time.

E experts, H hidden, I intermediate, S rows.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

Schedule = Literal["tile", "flat"]
"""tile: a program a work item.  flat: few programs take items in turn, loading the next while storing."""


@dataclass(frozen=True)
class TileConfig:
    """The blocks of one product: block_m rows, block_n columns (of gate and of up each, in the first), block_k of the
    contraction; warps a program, and how many steps of the contraction are in flight (stages).

    swapped: the weights are the tall side of the matrix instruction; block_n >= 64, block_m may then be 16.
    group_m: tiles of an expert that run side by side.  programs: a multiprocessor's share, where the schedule is not
    "tile"; the first product has no other schedule.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swapped: bool = False
    group_m: int = 16
    schedule: Schedule = "tile"
    programs: int = 1


@dataclass(frozen=True)
class ForwardTiles:
    """Both products work on the tiles of one Routing: their block_m is one."""

    gate_up: TileConfig
    down: TileConfig

    @property
    def block_m(self) -> int:
        return self.gate_up.block_m


@functools.lru_cache(maxsize=1 << 12)  # of a model's few shapes, at every number of tokens that comes
def forward_tiles(
    capability: tuple[int, int],
    hidden_size: int,
    intermediate_size: int,
    rows_per_expert: float,
    block_m: int | None = None,
) -> ForwardTiles:
    """The table's nearest entry, for elements of 16 bits.  rows_per_expert: S / E, and E counts empty experts too.

    block_m: of these entries alone; each table has some of 16, 32, 64 and 128.
    """
    shape = hidden_size, intermediate_size
    entries = [entry for entry in table(table_name(capability)) if block_m in (None, entry["block_m"])]
    return tiles_of(min(entries, key=lambda entry: _distance(entry, shape, rows_per_expert)))


def tiles_of(entry: Mapping[str, Any]) -> ForwardTiles:
    """An entry of a table -> its ForwardTiles."""
    block_m = entry["block_m"]
    return ForwardTiles(TileConfig(block_m, **entry["gate_up"]), TileConfig(block_m, **entry["down"]))


def table_name(capability: tuple[int, int]) -> str:
    """Tables of sm90 take 227 KB of shared memory a program, those of sm80 99 KB: newer desktop cards have no more."""
    return "sm90" if capability[0] in (9, 10) else "sm80"


@functools.cache
def table(name: str) -> list[dict[str, Any]]:
    """Entries as `tiles_of` takes them, with the hidden_size, intermediate_size and rows_per_expert they are for."""
    return json.loads(files("moebius.experts.fused").joinpath("tables", f"{name}.json").read_text())


def _distance(entry: dict[str, Any], shape: tuple[int, int], rows: float) -> float:
    """Doublings between what is wanted and what was measured, added up: rows as much as either size."""
    there = entry["hidden_size"], entry["intermediate_size"], entry["rows_per_expert"]
    return sum(abs(math.log2(wanted / found)) for wanted, found in zip((*shape, max(rows, 0.25)), there, strict=True))
