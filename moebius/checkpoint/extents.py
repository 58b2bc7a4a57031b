"""Jobs put together to extents: stretches of a file that are read once and go to several places.  No torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from moebius.checkpoint.blocks import cut
from moebius.checkpoint.files import ITEM_BYTES
from moebius.checkpoint.jobs import Job, Run, Staged, pieces


@dataclass(frozen=True, slots=True)
class Extent:
    """nbytes of a file from byte `offset` on; each of its jobs takes the bytes from its own offset on."""

    file: str
    offset: int
    nbytes: int
    jobs: tuple[Job, ...]


def extents(todo: Iterable[Job], limit: int) -> Iterator[Extent]:
    """All jobs, in the files' order, in extents of at most `limit` bytes without holes."""
    group: list[Job] = []
    for job in _in_order(piece for whole in todo for piece in _cut(whole, limit)):
        if group and not _goes_on(group, job, limit):
            yield _extent(group)
            group = []
        group.append(job)
    if group:
        yield _extent(group)


def offset_of(job: Job) -> int:
    """Where in the file a job's bytes begin."""
    match job:
        case Run():
            return job.offset
        case Staged():
            return job.info.offset + job.block.start * ITEM_BYTES[job.info.dtype]


def _in_order(todo: Iterable[Job]) -> Iterator[Job]:
    for _, jobs in groupby(todo, key=_file_of):
        yield from sorted(jobs, key=offset_of)


def _cut(job: Job, limit: int) -> Iterator[Job]:
    match job:
        case Run():
            yield from pieces(job, limit)
        case Staged():
            size = ITEM_BYTES[job.info.dtype]
            yield from (Staged(job.info, block, job.target) for block in cut(job.block, limit // size))


def _file_of(job: Job) -> str:
    return job.file if isinstance(job, Run) else job.info.file


def _goes_on(group: list[Job], job: Job, limit: int) -> bool:
    """Do the job's bytes begin within or right after the group's, and do all fit into one extent?"""
    first, end = offset_of(group[0]), max(offset_of(one) + one.nbytes for one in group[-2:])
    begin = offset_of(job)
    return _file_of(group[0]) == _file_of(job) and first <= begin <= end and begin + job.nbytes - first <= limit


def _extent(group: list[Job]) -> Extent:
    first = offset_of(group[0])
    end = max(offset_of(job) + job.nbytes for job in group)
    return Extent(_file_of(group[0]), first, end - first, tuple(group))
