"""Weights that are quantized while they are read: some rows at a time, values and scales straight into their places.

The weight itself never exists; its rows are put together as the files hold them, in slabs of whole quanta, and a slab
is quantized in pieces that stay in the cache.  Rows that share a scale never lie in two slabs, so that the result is,
bit for bit, that of the whole weight.  How slabs are quantized on a GPU says packing_batches.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.checkpoint.blocks import Block, cut, is_run, whole_block
from moebius.checkpoint.decoding import ReadInto, decoded_rows
from moebius.checkpoint.encodings import Encoded
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.operations import Part, Region, narrow_part
from moebius.checkpoint.planning import STAGING_BYTES, Pack
from moebius.checkpoint.pool import run_all
from moebius.checkpoint.quantizing import runs_of_rows, span
from moebius.checkpoint.reading import raw_bytes, torch_dtype
from moebius.errors import Fault
from moebius.quantization.decoding import quantize

PIECE_ELEMENTS = (1 << 15) - 1  # quantized at once: torch does so many on one thread, and leaves others to our readers
DEVICE_PIECE_ELEMENTS = 4 << 20  # on a GPU: their arithmetic and a slab of TRANSPOSED_BYTES fit DEVICE_PACKING_BYTES
TRANSPOSED_BYTES = 64 << 20  # for slabs of transposed rows, all threads together: a matrix is read again for every slab


class Slab(NamedTuple):
    """So many rows of one matrix of a weight, that at the leading indices `at`, within one segment."""

    pack: Pack
    part: Part
    at: tuple[int, ...]
    first: int
    rows: int
    segment: int

    @property
    def matrix(self) -> int:
        """The number of its matrix among those of the weight."""
        return _matrix(self.at, self.pack.shape[:-2])

    @property
    def nbytes(self) -> int:
        """In the file, of a plain weight."""
        return self.rows * self.pack.shape[-1] * ITEM_BYTES[self.pack.info.dtype]


def read_packed(
    packs: Sequence[Pack],
    tensors: Mapping[str, Tensor],
    read_into: ReadInto,
    *,
    threads: int = 0,
    advance: Callable[[int], None] = lambda nbytes: None,
    look_for_nan: bool = False,
) -> list[Fault]:
    """Quantizes stored weights into the tensors of their values and scales, each slab by itself.

    threads: 0 does it on this one.  advance: told how many stored bytes were read.  Gives a fault for every stored
    tensor in which there is NaN, if that was looked for.
    """
    found: set[str] = set()

    def work(slab: Slab) -> None:
        if _pack(slab, tensors, read_into, look_for_nan):
            found.add(slab.pack.info.name)
        if isinstance(slab.pack.info, TensorInfo):
            advance(slab.nbytes)

    plain = (pack for pack in packs if isinstance(pack.info, TensorInfo))
    run_all((slab for pack in plain for slab in slabs(pack, _slab_bytes(threads))), work, threads)
    for pack in (pack for pack in packs if isinstance(pack.info, Encoded)):
        run_all(slabs(pack, _slab_bytes(0)), work, 0)  # decoding spreads over the processors itself
        advance(pack.nbytes)
    return nan_faults(packs, found)


def nan_faults(packs: Sequence[Pack], found: set[str]) -> list[Fault]:
    """A fault for each pack whose stored tensor is named in `found`."""
    return [Fault(pack.info.name, "NaN", f"in {pack.info.file}") for pack in packs if pack.info.name in found]


def _pack(slab: Slab, tensors: Mapping[str, Tensor], read_into: ReadInto, look_for_nan: bool) -> bool:
    rows = _rows(slab, read_into)
    _quantize(slab, rows, tensors)
    return look_for_nan and bool(rows.isnan().any())


def _rows(slab: Slab, read_into: ReadInto) -> Tensor:
    """The slab [rows, in]: in the stored dtype, of a quantized weight in float32."""
    info, shape = slab.pack.info, (slab.rows, slab.pack.shape[-1])
    if isinstance(info, Encoded):
        return _decoded(info, _narrowed(_from_its_start(slab), slab.rows), shape, read_into)
    rows = torch.empty(shape, dtype=torch_dtype(info.dtype))
    _put_together(slab, raw_bytes(rows), read_into)
    return rows


def _slab_bytes(threads: int) -> Callable[[Part], int]:
    """A staging buffer, or more where every slab reads all of its matrix."""
    transposed = TRANSPOSED_BYTES // max(1, threads)
    return lambda part: transposed if _inner_axis(part) != len(part.place.start) - 1 else STAGING_BYTES


# --- the weight's rows, in slabs ---------------------------------------------------------------------------------


def slabs(pack: Pack, nbytes: Callable[[Part], int]) -> Iterator[Slab]:
    """A stored weight in slabs of about so many bytes of each of its parts; in float32, if it is decoded first."""
    for part in pack.parts:
        step, lead = _rows_of_a_slab(pack, nbytes(part)), range(len(pack.shape) - 2)
        for at in product(*(_indices(part, axis) for axis in lead)):
            for first, count, segment in runs_of_rows(pack, part):
                for row in range(first, first + count, step):
                    yield Slab(pack, part, at, row, min(step, first + count - row), segment)


def _rows_of_a_slab(pack: Pack, nbytes: int) -> int:
    """Whole quanta of at most so many bytes, if one is not more."""
    size = ITEM_BYTES["float32" if isinstance(pack.info, Encoded) else pack.info.dtype]
    quantum = pack.form.quantum_rows
    return max(1, nbytes // max(1, pack.shape[-1] * size) // quantum) * quantum


def _inner_axis(part: Part) -> int:
    """The stored axis along which the weight's rows run."""
    return part.place.axes[part.origin.axes.index(len(part.origin.start) - 1)]


def _indices(part: Part, axis: int) -> range:
    start, step, count = span(part.origin, part.shape, axis)
    return range(start, start + step * count, step)


def _from_its_start(slab: Slab) -> Part:
    """The slab's part, its origin counted from the slab's first row: alike for all experts of all layers."""
    origin, at = slab.part.origin, (*slab.at, slab.first, 0)
    start = tuple(index - first for index, first in zip(origin.start, at, strict=True))
    return Part("", slab.part.shape, Region(start, origin.axes, origin.steps), slab.part.place)


def _narrowed(part: Part, rows: int) -> Part:
    """What of a part lies in the first rows of the first matrix of its origin."""
    inside: Part | None = _swapped(part)
    lead = len(part.origin.start) - 2
    for axis, count in enumerate((*(1 for _ in range(lead)), rows)):
        inside = inside and narrow_part(inside, axis, 0, count)
    assert inside is not None  # the slab was cut from it
    return _swapped(inside)


def _swapped(part: Part) -> Part:
    return Part(part.name, part.shape, part.place, part.origin)


# --- as the files hold them ----------------------------------------------------------------------------------------


def _put_together(slab: Slab, memory: memoryview, read_into: ReadInto) -> None:
    """Fills `memory`, slab.nbytes, with the slab [rows, in] of a plain weight, in the stored dtype."""
    info = slab.pack.info
    assert isinstance(info, TensorInfo)
    block, run = _block(_from_its_start(slab), (slab.rows, slab.pack.shape[-1]), info.shape)
    if run:
        read_into(info, memory, block.start * ITEM_BYTES[info.dtype])
    else:
        _rearrange(info, block, torch.frombuffer(memory, dtype=torch_dtype(info.dtype)), read_into)


@lru_cache(maxsize=1 << 14)  # layers are alike
def _block(part: Part, shape: tuple[int, int], stored: tuple[int, ...]) -> tuple[Block, bool]:
    """What of a part lies in a slab, as one block, and whether its bytes lie alike on both sides."""
    inside = _narrowed(part, shape[0])
    block = whole_block(inside, stored, _with_lead(inside, shape))
    return block, is_run(block)


def _rearrange(info: TensorInfo, block: Block, slab: Tensor, read_into: ReadInto) -> None:
    size = ITEM_BYTES[info.dtype]
    staging = torch.empty(min(block.length, max(1, STAGING_BYTES // size)), dtype=slab.dtype)
    for piece in cut(block, staging.numel()):
        read_into(info, raw_bytes(staging)[: piece.length * size], piece.start * size)
        found = staging.as_strided(piece.shape, piece.stored_strides)
        slab.as_strided(piece.shape, piece.strides, piece.offset).copy_(found)


def _decoded(info: Encoded, part: Part, shape: tuple[int, int], read_into: ReadInto) -> Tensor:
    """Decodes the stored rows in which the part lies, whole quanta of them, and takes the part out."""
    *lead, height, width = info.shape
    spans = [span(part.place, part.shape, axis) for axis in range(len(info.shape) - 1)]
    begin, end = _around(spans[-1], info.form.quantum_rows, height)
    indices = [range(start, start + step * (count - 1) + 1) for start, step, count in spans[:-1]]
    matrices = [_matrix(at, lead) for at in product(*indices)]
    box = torch.stack([decoded_rows(info, matrix, begin, end - begin, read_into) for matrix in matrices])
    stored = (*(len(each) for each in indices), end - begin, width)
    inside: Part | None = part
    for axis, first in enumerate((*(each.start for each in indices), begin)):
        inside = inside and narrow_part(inside, axis, first, stored[axis])
    assert inside is not None  # the box was cut around it
    block = whole_block(inside, stored, _with_lead(part, shape))
    slab = torch.empty(shape)
    slab.as_strided(block.shape, block.strides, block.offset).copy_(
        box.as_strided(block.shape, block.stored_strides, block.start)
    )
    return slab


def _around(rows: tuple[int, int, int], quantum: int, height: int) -> tuple[int, int]:
    """The whole quanta around rows (start, step, count)."""
    start, step, count = rows
    return start // quantum * quantum, min(height, math.ceil((start + step * (count - 1) + 1) / quantum) * quantum)


def _matrix(at: Sequence[int], lead: Sequence[int]) -> int:
    """The number of the matrix at these indices of the leading axes."""
    number = 0
    for index, size in zip(at, lead, strict=True):
        number = number * size + index
    return number


def _with_lead(part: Part, shape: tuple[int, int]) -> tuple[int, ...]:
    """The slab's shape with the weight's leading axes, of which it holds one index."""
    return (*(1 for _ in part.origin.start[2:]), *shape)


# --- quantized -----------------------------------------------------------------------------------------------------


def _quantize(slab: Slab, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Rows of a slab into the places of their values and scales."""
    pack, quantum = slab.pack, slab.pack.form.quantum_rows
    values, scales = (place[0] for place in places(slab, tensors))
    limit = PIECE_ELEMENTS if values.device.type == "cpu" else DEVICE_PIECE_ELEMENTS
    for row, column, piece in _pieces(pack, rows.to(values.device), limit):
        packed, packed_scales = quantize(pack.form, piece)
        _put(packed, values, row, column * values.shape[1] // pack.shape[-1])
        _put(packed_scales, scales, row // quantum, column * scales.shape[1] // pack.shape[-1])


def places(slab: Slab, tensors: Mapping[str, Tensor], n: int = 1) -> tuple[Tensor, Tensor]:
    """Where the values [n, rows, ...] and scales [n, ceil(rows / quantum rows), ...] of a slab, and of the same rows of
    the matrices after its own, go, as views.
    """
    pack, quantum = slab.pack, slab.pack.form.quantum_rows
    height = pack.shape[-2] // pack.segments
    above = slab.segment * math.ceil(height / quantum) + (slab.first - slab.segment * height) // quantum
    values, scales = (_matrices(tensors[name], slab, n) for name in (pack.name, pack.scale_name))
    return values[:, slab.first : slab.first + slab.rows], scales[:, above : above + math.ceil(slab.rows / quantum)]


def _matrices(tensor: Tensor, slab: Slab, n: int) -> Tensor:
    """n matrices [n, rows, ...] of a weight's values or scales, from that of the slab on."""
    return tensor.unsqueeze(0).flatten(0, len(slab.at))[slab.matrix : slab.matrix + n]


def _pieces(pack: Pack, rows: Tensor, limit: int) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column, piece) of a slab: whole quanta, of at most so many elements if one is not more."""
    width = rows.shape[-1]
    down, across = pack.form.quantum(width)
    columns = max(1, min(width, limit // down) // across) * across
    count = max(1, limit // columns // down) * down
    for row, column in product(range(0, len(rows), count), range(0, width, columns)):
        yield row, column, rows[row : row + count, column : column + columns]


def _put(found: Tensor, matrix: Tensor, row: int, column: int) -> None:
    matrix[row : row + found.shape[0], column : column + found.shape[1]].copy_(found)
