"""Runs a save plan: several shards at once, each written by one thread from its first byte to its last.  Where several
processes write, each puts its jobs at their places in files that are there already.

A file system lets one writer at a time into a file (ext4 and xfs do), so that more threads a file only wait for one
another.  A run is bytes that lie in a tensor as they will lie in the file: they are written from where they are.  What
is rearranged or cast is put together in slabs, stretches of the file of at most a staging buffer.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from moebius.checkpoint.blocks import Block, is_run
from moebius.checkpoint.direct import new_file, standing_file, write_at
from moebius.checkpoint.fetching import WRITE_BYTES, Lane, block_in, lanes_to
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.operations import Part, narrow_part
from moebius.checkpoint.planning import STAGING_BYTES, Read
from moebius.checkpoint.pool import run_all
from moebius.checkpoint.quantizing import span
from moebius.checkpoint.reading import Shards, torch_dtype
from moebius.checkpoint.reversing import SavePlan, Shard

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """`length` elements of a tensor, from element `start` of its storage on, which go to byte `offset` of the file."""

    offset: int
    nbytes: int
    tensor: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Slab:
    """A box of `shape` of a stored tensor, one stretch of the file; each part's place is within it."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that goes from the source's file to the new one."""

    offset: int
    nbytes: int
    stored: TensorInfo


Job = Run | Slab | Carried


def write_shards(
    folder: Path,
    plan: SavePlan,
    tensors: Tensors,
    source: Shards,
    *,
    threads: int,
    advance: Callable[[int], None],
    checksums: bool = False,
) -> dict[str, str]:
    """Writes the plan's shards into the empty `folder`, flushed to the disk; {file name: sha256} if `checksums`.

    source: what carried tensors are read from.  threads: 0 does it all in this one.  advance: told of bytes as they
    are written.
    """
    writer = _Writer(folder, tensors, source, threads, advance, checksums)
    run_all(plan.shards, writer.write, min(threads, len(plan.shards)))
    return writer.digests


def fill_shards(
    folder: Path,
    share: SavePlan,
    tensors: Tensors,
    source: Shards,
    *,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Writes a share of a plan into the files of `folder`, which have their headers and lengths, and flushes them.

    tensors: as the share's origins count.  The rest as in `write_shards`.
    """
    writer = _Writer(folder, tensors, source, threads, advance)
    run_all(share.shards, writer.fill, min(threads, len(share.shards)))


class _Writer:
    def __init__(
        self,
        folder: Path,
        tensors: Tensors,
        source: Shards,
        threads: int,
        advance: Callable[[int], None],
        checksums: bool = False,
    ):
        self._folder, self._source, self._advance, self._checksums = folder, source, advance, checksums
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._lanes: SimpleQueue[Mapping[torch.device, Lane]] = SimpleQueue()
        devices = {tensor.device for tensor in tensors.values()}
        for _ in range(max(1, threads)):
            self._lanes.put(lanes_to(devices))
        self._lock = Lock()
        self.digests: dict[str, str] = {}

    def write(self, shard: Shard) -> None:
        """The header, then every tensor from its first byte to its last, so that a checksum can be taken on the way."""
        lanes, digest = self._lanes.get(), hashlib.sha256()
        with new_file(self._folder / shard.name, shard.nbytes) as file:
            for held in self._all(shard, lanes):
                if self._checksums:
                    digest.update(held)
                file.write(held)
        self._lanes.put(lanes)
        if self._checksums:
            self.digests[shard.name] = digest.hexdigest()

    def fill(self, shard: Shard) -> None:
        """What the shard has tensors of, in its places."""
        lanes = self._lanes.get()
        with standing_file(self._folder / shard.name) as descriptor:
            for job in sorted(jobs_of(shard, self._tensors), key=lambda job: job.offset):
                offset = job.offset
                for held in self._pieces(job, lanes):
                    write_at(descriptor, held, offset)
                    offset += len(held)
                self._done(job)
        self._lanes.put(lanes)

    def _all(self, shard: Shard, lanes: Mapping[torch.device, Lane]) -> Iterator[memoryview]:
        """The whole file, in order; the bytes hold until the next are asked for."""
        yield memoryview(shard.header)
        for job in sorted(jobs_of(shard, self._tensors), key=lambda job: job.offset):
            yield from self._pieces(job, lanes)
            self._done(job)

    def _done(self, job: Job) -> None:
        with self._lock:
            self._advance(job.nbytes)

    def _pieces(self, job: Job, lanes: Mapping[torch.device, Lane]) -> Iterator[memoryview]:
        match job:
            case Run():
                tensor = self._tensors[job.tensor]
                found = tensor.as_strided((job.length,), (1,), job.start)
                yield lanes[tensor.device].host(found)
            case Slab():
                yield self._slab(job, lanes)
            case Carried():
                buffer = memoryview(bytearray(min(job.nbytes, STAGING_BYTES)))
                for start in range(0, job.nbytes, STAGING_BYTES):
                    held = buffer[: min(STAGING_BYTES, job.nbytes - start)]
                    self._source.read_into(job.stored, held, start)
                    yield held

    def _slab(self, slab: Slab, lanes: Mapping[torch.device, Lane]) -> memoryview:
        """Put together on the device of its parts; a conversion's tensors are on one."""
        lane = lanes[self._tensors[slab.parts[0].name].device]
        scratch = lane.scratch()[: slab.nbytes].view(torch_dtype(slab.dtype))
        for part in slab.parts:
            tensor = self._tensors[part.name]
            lane.place(scratch, block_in(part, slab.shape, tensor), tensor)
        return lane.host(scratch)


# --- what is to be done -----------------------------------------------------------------------------------------------


def jobs_of(shard: Shard, tensors: Tensors) -> Iterator[Job]:
    """Everything of a shard behind its header that has a place in the tensors: every byte once, in no order."""
    for read in shard.reads:
        yield from _jobs_of_read(read, tensors)
    yield from (Carried(info.offset, info.nbytes, stored) for info, stored in shard.carried if info.nbytes)


def _jobs_of_read(read: Read, tensors: Tensors) -> Iterator[Job]:
    """Runs, if all parts of the tensor are; else slabs, of whose bytes each is written once."""
    info = read.info
    held = [(block_in(part, info.shape, tensors[part.name]), part.name) for part in read.parts]
    if all(is_run(block) and tensors[name].dtype == torch_dtype(info.dtype) for block, name in held):
        for block, name in held:
            yield from _runs(info, block, name)
    else:
        yield from _filled(info, 0, info.shape, read.parts, info.offset)


def _runs(info: TensorInfo, block: Block, name: str) -> Iterator[Run]:
    size = ITEM_BYTES[info.dtype]
    step = WRITE_BYTES // size
    for done in range(0, math.prod(block.shape), step):
        length = min(step, block.length - done)
        yield Run(info.offset + (block.start + done) * size, length * size, name, block.offset + done, length)


def _filled(info: TensorInfo, axis: int, shape: tuple[int, ...], parts: Sequence[Part], offset: int) -> Iterator[Slab]:
    """Slabs of what the parts fill of the box, which has one row of each axis before `axis`.

    Where they leave gaps, which other processes fill, the box is cut along the axis at the parts' borders; rows that
    are still not full go on along the next axis.
    """
    taken = sum(math.prod(part.shape) for part in parts)
    if taken == math.prod(shape):
        yield from _slabs(info, axis, shape, tuple(parts), offset)
    elif taken:
        row = math.prod(shape[axis + 1 :]) * ITEM_BYTES[info.dtype]
        for first, end in pairwise(_borders(parts, axis, shape[axis])):
            inside = [kept for part in parts if (kept := narrow_part(part, axis, first, end - first))]
            narrowed = (*shape[:axis], end - first, *shape[axis + 1 :])
            yield from _filled(info, axis + (end - first == 1), narrowed, inside, offset + first * row)


def _borders(parts: Sequence[Part], axis: int, size: int) -> list[int]:
    """Where to cut an axis: where parts begin and end, or, if that is at its ends alone, at every row."""
    spans = [span(part.place, part.shape, axis) for part in parts]
    ends = {end for start, step, count in spans for end in (start, start + step * (count - 1) + 1)}
    return sorted({0, size, *ends}) if ends - {0, size} else list(range(size + 1))


def _slabs(info: TensorInfo, axis: int, shape: tuple[int, ...], parts: tuple[Part, ...], offset: int) -> Iterator[Slab]:
    """The box in slabs of at most STAGING_BYTES: rows of the first axis of which a row, or of the last, fits."""
    row = math.prod(shape[axis + 1 :]) * ITEM_BYTES[info.dtype]
    count = shape[axis] if axis < len(shape) else 1
    if not count * row:
        return
    if count * row <= STAGING_BYTES:
        yield Slab(offset, count * row, info.dtype, shape, parts)
        return
    step = max(1, STAGING_BYTES // row)
    for first in range(0, count, step):
        rows = min(step, count - first)
        inside = tuple(kept for part in parts if (kept := narrow_part(part, axis, first, rows)))
        narrowed = (*shape[:axis], rows, *shape[axis + 1 :])
        yield from _slabs(info, axis + (row > STAGING_BYTES), narrowed, inside, offset + first * row)
