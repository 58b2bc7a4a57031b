"""CPU tensors that are cast or rearranged while they are read: readers fill small buffers ahead, one thread copies.

Only the thread that called copies, because torch spreads a copy over the processors by itself; copies from several
threads would start a team each, and stand in each other's way.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

from moebius.checkpoint.extents import Extent, extents, offset_of
from moebius.checkpoint.jobs import Staged
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype

BUFFER_BYTES = 1 << 20  # stays in the cache between the read and the copy

Filled = tuple[Extent, Tensor]


def stage(
    jobs: Iterable[Staged],
    tensors: Mapping[str, Tensor],
    shards: Shards,
    *,
    readers: int,
    advance: Callable[[int], None],
) -> None:
    """Fills the places of all jobs.  readers: threads that read ahead, a buffer each; 0 reads in this one."""
    buffers = deque(torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(readers + 1))

    def read(extent: Extent, buffer: Tensor) -> Filled:
        read_into(shards.descriptor(extent.file), raw_bytes(buffer)[: extent.nbytes], extent.offset, extent.file)
        return extent, buffer

    def copy(filled: Filled) -> None:
        extent, buffer = filled
        for job in extent.jobs:
            if isinstance(job, Staged):
                _place(job, tensors[job.target], buffer[offset_of(job) - extent.offset :])
        buffers.append(buffer)
        advance(sum(job.payload for job in extent.jobs))

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(readers, "moebius-reader")) if readers else None
        ahead: deque[Future[Filled]] = deque()
        stack.callback(lambda: [future.cancel() for future in ahead])  # the first error ends it
        for extent in extents(jobs, BUFFER_BYTES):
            if pool is None:
                copy(read(extent, buffers.popleft()))
                continue
            if not buffers:
                copy(ahead.popleft().result())
            ahead.append(pool.submit(read, extent, buffers.popleft()))
        while ahead:
            copy(ahead.popleft().result())


def _place(job: Staged, target: Tensor, source: Tensor) -> None:
    block, dtype = job.block, torch_dtype(job.info.dtype)
    source = source[: job.nbytes]
    if source.storage_offset() % dtype.itemsize:
        source = source.clone()  # a file may begin its tensors anywhere
    found = source.view(dtype).as_strided(block.shape, block.stored_strides, source.storage_offset() // dtype.itemsize)
    target.as_strided(block.shape, block.strides, block.offset).copy_(found)
