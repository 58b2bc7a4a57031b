"""Which rows an expert has, and the tiles that cover them, found on the device: no host sync, no atomics.

A slot is token * K + k.  Slots are sorted by expert, ties in slot order; slots of foreign experts stand last.

T tokens, K experts a token, E experts, S = T*K rows.
"""

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from moebius.experts.fused.jit import jit

RANKED_SLOTS = 4096
"""Up to so many slots, each one's place is found by comparing it with all: one launch, and no sort.  The comparisons
are S^2, so beyond, chunks of slots are counted, then sorted and moved to their places.
"""
SLOTS_A_PROGRAM, KEYS_A_STEP, LISTERS = 32, 2048, 4  # 128 programs of slots and 4: an H200 has 132 processors
SLOT_BITS, SLOT_MASK = tl.constexpr(16), tl.constexpr(0xFFFF)
"""A key is expert << SLOT_BITS | slot (in its chunk, if sorted), so keys are unique and ties cannot be."""
CHUNKS = tl.constexpr(16)
TILES = tl.constexpr(16)


@dataclass(frozen=True)
class Routing:
    """order [S] int32: the slot at each sorted place.  inverse [S] int32: the sorted place of each slot.

    offsets [E+1] int32: the rows of expert e are offsets[e]..offsets[e+1]; offsets[E] is where foreign rows begin.
    tile_expert, tile_row [max_tiles] int32: expert and first sorted row of each tile of block_m rows, by expert; an
    expert's last tile may reach into the next one's rows.  Surplus tiles have tile_expert -1.  num_tiles [1] int32: how
    many are no surplus.  max_tiles = S // block_m + min(S, E), a bound that the host knows.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    num_tiles: Tensor
    block_m: int
    top_k: int

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> int:
        return len(self.order)

    @property
    def rows_per_expert(self) -> float:
        """On average; empty experts count too, and foreign rows."""
        return self.rows / self.num_experts

    @property
    def max_tiles(self) -> int:
        return len(self.tile_expert)

    @property
    def tiles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels take to find their work: offsets, tile_expert, tile_row, num_tiles."""
        return self.offsets, self.tile_expert, self.tile_row, self.num_tiles


def route(top_k_index: Tensor, num_experts: int, block_m: int) -> Routing:
    """top_k_index [T, K] int64 -> Routing over tiles of block_m rows.  Bits repeat; a CUDA graph can capture it."""
    rows = top_k_index.numel()
    order, inverse, offsets = _integers(top_k_index.device, rows, rows, num_experts + 1)
    routing = _untiled(order, inverse, offsets, top_k_index.shape[1], block_m)
    if rows <= RANKED_SLOTS:
        _route_by_rank(top_k_index.contiguous(), routing)
    else:
        _route_in_chunks(top_k_index.contiguous(), routing, chunk_slots(rows))
    return routing


def tiled(order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, block_m: int) -> Routing:
    """order, inverse [S] and offsets [E+1] of a Routing -> the Routing with tiles of block_m rows."""
    routing = _untiled(order, inverse, offsets, top_k, block_m)
    _tile_kernel[(math.ceil(routing.max_tiles / TILES.value),)](
        *routing.tiles, routing.max_tiles, routing.num_experts, EXPERTS=_padded(routing), BLOCK_M=block_m
    )
    return routing


def chunk_slots(rows: int) -> int:
    """Slots a program: small enough to fill a card; larger where counts of so many chunks would take long to add."""
    return 1024 if rows <= 1 << 17 else 4096


def _untiled(order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int, block_m: int) -> Routing:
    """A Routing whose tiles are still to be found."""
    rows, num_experts = len(order), len(offsets) - 1
    max_tiles = rows // block_m + min(rows, num_experts)
    tile_expert, tile_row, num_tiles = _integers(order.device, max_tiles, max_tiles, 1)
    return Routing(order, inverse, offsets, tile_expert, tile_row, num_tiles, block_m, top_k)


def _integers(device: torch.device, *sizes: int) -> list[Tensor]:
    return [torch.empty(size, dtype=torch.int32, device=device) for size in sizes]


def _route_by_rank(top_k_index: Tensor, routing: Routing) -> None:
    keys = min(KEYS_A_STEP, max(128, _power_of_2(routing.rows)))
    listers = min(LISTERS, max(1, math.ceil(routing.max_tiles / TILES.value)))
    _rank_kernel[(listers + math.ceil(routing.rows / SLOTS_A_PROGRAM),)](
        top_k_index, routing.order, routing.inverse, *routing.tiles, routing.max_tiles, routing.rows,
        routing.num_experts, listers, SLOTS=SLOTS_A_PROGRAM, KEYS=keys, EXPERTS=_power_of_2(routing.num_experts),
        BLOCK_M=routing.block_m, num_warps=8,
    )  # fmt: skip


def _route_in_chunks(top_k_index: Tensor, routing: Routing, chunk: int) -> None:
    chunks = math.ceil(routing.rows / chunk)
    (counts,) = _integers(top_k_index.device, chunks * _padded(routing))
    sizes = {"SLOTS": chunk, "EXPERTS": _padded(routing), "num_warps": 8}
    _count_kernel[(chunks,)](top_k_index, counts, routing.rows, routing.num_experts, **sizes)
    _place_kernel[(chunks,)](
        top_k_index, counts, routing.order, routing.inverse, *routing.tiles, routing.max_tiles, routing.rows,
        routing.num_experts, chunks, BLOCK_M=routing.block_m, **sizes,
    )  # fmt: skip


def _padded(routing: Routing) -> int:
    """Columns of a histogram over the experts, the foreign among them."""
    return _power_of_2(routing.num_experts + 1)


def _power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@jit(do_not_specialize=["max_tiles", "rows", "num_experts", "listers"])
def _rank_kernel(
    index, order, inverse, offsets, tile_expert, tile_row, num_tiles, max_tiles, rows, num_experts, listers,
    SLOTS: tl.constexpr, KEYS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first programs count all slots and list the tiles; each of the others finds the places of its own slots."""
    program = tl.program_id(0)
    if program < listers:
        counts = tl.zeros((EXPERTS,), tl.int32)
        for first in range(0, rows, KEYS):
            expert = _keys(index, first, first, rows, num_experts, KEYS) >> SLOT_BITS
            counts += tl.histogram(expert, EXPERTS, mask=expert < num_experts)
        starts = tl.cumsum(counts, 0) - counts
        if program == 0:
            _store_offsets(offsets, starts, counts, num_experts, EXPERTS)
        _store_tiles(
            starts, counts, tile_expert, tile_row, num_tiles, max_tiles, num_experts, program, listers, EXPERTS, BLOCK_M
        )
    else:
        mine = (program - listers) * SLOTS
        own = _keys(index, mine, mine, rows, num_experts, SLOTS)
        place = tl.zeros((SLOTS,), tl.int32)
        for first in range(0, rows, KEYS):
            keys = _keys(index, first, first, rows, num_experts, KEYS)
            # the sign bit of a difference: half the instructions of a comparison
            place -= tl.sum((keys[:, None] - own[None, :]) >> 31, 0)
        slot = own & SLOT_MASK
        tl.store(order + place, slot, mask=slot < rows)
        tl.store(inverse + slot, place, mask=slot < rows)


@jit(do_not_specialize=["rows", "num_experts"])
def _count_kernel(index, counts, rows, num_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """counts [chunks, EXPERTS]: the slots of each expert in each chunk."""
    chunk = tl.program_id(0)
    experts = _keys(index, chunk * SLOTS, 0, rows, num_experts, SLOTS) >> SLOT_BITS
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), tl.histogram(experts, EXPERTS))


@jit(do_not_specialize=["max_tiles", "rows", "num_experts", "chunks"])
def _place_kernel(
    index, counts, order, inverse, offsets, tile_expert, tile_row, num_tiles, max_tiles, rows, num_experts, chunks,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A chunk sorts its slots; each expert's run is moved behind those of the experts and chunks before it."""
    chunk = tl.program_id(0)
    total, before = _totals(counts, chunk, chunks, EXPERTS)
    starts = tl.cumsum(total, 0) - total
    keys = tl.sort(_keys(index, chunk * SLOTS, 0, rows, num_experts, SLOTS))
    here = tl.load(counts + chunk * EXPERTS + tl.arange(0, EXPERTS))
    shift = starts + before - (tl.cumsum(here, 0) - here)
    place = tl.arange(0, SLOTS) + tl.gather(shift, keys >> SLOT_BITS, 0)
    slot = chunk * SLOTS + (keys & SLOT_MASK)
    tl.store(order + place, slot, mask=slot < rows)
    tl.store(inverse + slot, place, mask=slot < rows)
    if chunk == 0:
        _store_offsets(offsets, starts, total, num_experts, EXPERTS)
    _store_tiles(
        starts, total, tile_expert, tile_row, num_tiles, max_tiles, num_experts, chunk, chunks, EXPERTS, BLOCK_M
    )


@jit(do_not_specialize=["max_tiles", "num_experts"])
def _tile_kernel(
    offsets, tile_expert, tile_row, num_tiles, max_tiles, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + experts, mask=experts <= num_experts, other=0)
    counts = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0) - starts
    _store_tiles(
        starts, counts, tile_expert, tile_row, num_tiles, max_tiles, num_experts,
        tl.program_id(0), tl.num_programs(0), EXPERTS, BLOCK_M,
    )  # fmt: skip


@jit
def _keys(index, first, label, rows, num_experts, SLOTS: tl.constexpr):
    """Of slots from `first` on, labelled from `label` on.  Those beyond the last count as foreign, and stand last."""
    slot = tl.arange(0, SLOTS)
    expert = tl.load(index + first + slot, mask=first + slot < rows, other=-1)
    owned = (expert >= 0) & (expert < num_experts)
    return (tl.where(owned, expert, num_experts).to(tl.int32) << SLOT_BITS) | (label + slot)


@jit
def _totals(counts, chunk, chunks, EXPERTS: tl.constexpr):
    """counts [chunks, EXPERTS] added up: over all chunks, and over those before this one."""
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        row = first + tl.arange(0, CHUNKS)[:, None]
        block = tl.load(counts + row * EXPERTS + experts[None, :], mask=row < chunks, other=0)
        total += tl.sum(block, 0)
        before += tl.sum(tl.where(row < chunk, block, 0), 0)
    return total, before


@jit
def _store_offsets(offsets, starts, counts, num_experts, EXPERTS: tl.constexpr):
    experts = tl.arange(0, EXPERTS)
    owned = experts < num_experts
    tl.store(offsets + experts, starts, mask=owned)
    tl.store(offsets + num_experts, tl.sum(tl.where(owned, counts, 0), 0))


@jit
def _store_tiles(
    starts, counts, tile_expert, tile_row, num_tiles, max_tiles, num_experts, program, programs,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each program lists every programs-th run of tiles: a tile's expert is how many experts' tiles end before it."""
    experts = tl.arange(0, EXPERTS)
    tiles = tl.where(experts < num_experts, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    ends = tl.cumsum(tiles, 0)
    shifts = starts - (ends - tiles) * BLOCK_M
    if program == 0:
        tl.store(num_tiles, tl.sum(tiles, 0))
    for first in range(program * TILES, max_tiles, programs * TILES):
        tile = first + tl.arange(0, TILES)
        expert = tl.sum((ends[:, None] <= tile[None, :]).to(tl.int32), 0)
        shift = tl.gather(shifts, tl.minimum(expert, EXPERTS - 1), 0)
        tl.store(tile_expert + tile, tl.where(expert < EXPERTS, expert, -1), mask=tile < max_tiles)
        tl.store(tile_row + tile, tile * BLOCK_M + shift, mask=tile < max_tiles)
