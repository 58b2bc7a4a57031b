"""CPU tensors that are cast or rearranged while they are read: each thread has a small buffer, and copies from it.

A copy is made in slices so small that torch does not spread it over the processors: every reader would otherwise start
a team of threads of its own, and the teams stand in each other's way.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from moebius.checkpoint.extents import Extent, extents, offset_of
from moebius.checkpoint.jobs import Staged
from moebius.checkpoint.pages import make_present
from moebius.checkpoint.pool import run_each
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype

BUFFER_BYTES = 1 << 20  # stays in the cache between the read and the copy
SLICE = 1 << 15  # elements; torch shares out a loop that has more (at::internal::GRAIN_SIZE)


def stage(
    jobs: Iterable[Staged],
    tensors: Mapping[str, Tensor],
    shards: Shards,
    *,
    readers: int,
    advance: Callable[[int], None],
) -> None:
    """Fills the places of all jobs.  readers: threads, with a buffer each; 0 reads in this one."""

    def begin() -> Callable[[Extent], None]:
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)

        def fill(extent: Extent) -> None:
            read_into(shards.descriptor(extent.file), raw_bytes(buffer)[: extent.nbytes], extent.offset, extent.file)
            for job in extent.jobs:
                if isinstance(job, Staged):
                    _place(job, tensors[job.target], buffer[offset_of(job) - extent.offset :])
            advance(sum(job.payload for job in extent.jobs))

        return fill

    run_each(extents(jobs, BUFFER_BYTES), begin, readers)


def _place(job: Staged, target: Tensor, source: Tensor) -> None:
    block, dtype = job.block, torch_dtype(job.info.dtype)
    source = source[: job.nbytes]
    if source.storage_offset() % dtype.itemsize:
        source = source.clone()  # a file may begin its tensors anywhere
    found = source.view(dtype).as_strided(block.shape, block.stored_strides, source.storage_offset() // dtype.itemsize)
    _copy(target.as_strided(block.shape, block.strides, block.offset), found)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.view(-1), source.view(-1)
        make_present(target)
    if target.numel() <= SLICE:
        target.copy_(source)
        return
    rows = max(1, SLICE * len(target) // target.numel())
    for into, out in zip(target.split(rows), source.split(rows), strict=True):
        into.copy_(out)
