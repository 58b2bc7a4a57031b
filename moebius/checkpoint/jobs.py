"""What loading has to do, as independent jobs in the files' order.  No torch.

A run is bytes that lie in the file as they will lie in the target; what is not, a cast or a permutation, is staged.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from moebius.checkpoint.blocks import Block, is_run, whole_block
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.operations import Part, Region
from moebius.checkpoint.planning import Plan

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """nbytes from byte `offset` of a file, which go to byte `start` of a target."""

    file: str
    offset: int
    nbytes: int
    target: str
    start: int

    @property
    def payload(self) -> int:
        return self.nbytes


@dataclass(frozen=True, slots=True)
class Staged:
    """A block of a stored tensor that is read into a buffer and copied to its place in the target from there."""

    info: TensorInfo
    block: Block
    target: str

    @property
    def nbytes(self) -> int:
        """Of the stretch of the file that it spans; others may take what lies between its elements."""
        return self.block.length * ITEM_BYTES[self.info.dtype]

    @property
    def payload(self) -> int:
        """Of its elements alone."""
        return math.prod(self.block.shape) * ITEM_BYTES[self.info.dtype]


Job = Run | Staged


def jobs(plan: Plan) -> Iterator[Job]:
    """A job a part of every read, in their order, neighbours joined where they stay neighbours."""
    return _joined(_jobs(plan))


def pieces(run: Run, nbytes: int) -> Iterator[Run]:
    """The run in pieces of at most so many bytes."""
    if run.nbytes <= nbytes:
        yield run
        return
    for done in range(0, run.nbytes, nbytes):
        yield part_of(run, done, min(nbytes, run.nbytes - done))


def part_of(run: Run, start: int, nbytes: int) -> Run:
    """`nbytes` of a run, from its byte `start` on."""
    return Run(run.file, run.offset + start, nbytes, run.target, run.start + start)


def _jobs(plan: Plan) -> Iterator[Job]:
    for read in plan.reads:
        info, size = read.info, ITEM_BYTES[read.info.dtype]
        for part in read.parts:
            target = plan.targets[part.name]
            block, run = _block(part.shape, part.origin, part.place, info.shape, target.shape)
            if run and target.dtype == info.dtype:
                offset = info.offset + block.start * size
                yield Run(info.file, offset, block.length * size, part.name, block.offset * size)
            else:
                yield Staged(info, block, part.name)


@lru_cache(maxsize=1 << 14)  # layers are alike
def _block(shape: Shape, origin: Region, place: Region, stored: Shape, target: Shape) -> tuple[Block, bool]:
    """A part as one block, and whether its bytes lie alike on both sides."""
    block = whole_block(Part("", shape, origin, place), stored, target)
    return block, is_run(block)


def _joined(found: Iterable[Job]) -> Iterator[Job]:
    last: Run | None = None
    for job in found:
        if isinstance(job, Run) and last is not None and _follows(last, job):
            last = Run(last.file, last.offset, last.nbytes + job.nbytes, last.target, last.start)
            continue
        if last is not None:
            yield last
        last = job if isinstance(job, Run) else None
        if last is None:
            yield job
    if last is not None:
        yield last


def _follows(one: Run, other: Run) -> bool:
    """Does `other` go on where `one` ends, in the file and in the target?"""
    places = (one.file, one.offset + one.nbytes, one.target, one.start + one.nbytes)
    return places == (other.file, other.offset, other.target, other.start)
