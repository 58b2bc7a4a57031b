"""Filling tensors on a GPU: readers fill pinned slots from the files, and copies go on while they read the next ones.

Each reader has a lane of its own: two slots of pinned memory, a stream, and a bounce buffer on the device for what has
to be cast or rearranged there.  A slot is filled again once the copies from it are done.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from moebius.checkpoint.extents import Extent, offset_of
from moebius.checkpoint.files import ITEM_BYTES
from moebius.checkpoint.jobs import Run, Staged
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype

SLOT_BYTES = 8 << 20
READERS = 12  # measured on one H200 host with 16 cores; more slots than fit the processors' cache are slower
STREAMS = 2


class Lane(Protocol):
    """One reader's way to the device; what it does happens in order, perhaps later."""

    def slot(self) -> Tensor:
        """SLOT_BYTES of host memory (uint8) from which every earlier copy is done."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target (on the device) becomes source (a part of the slot), both flat bytes."""
        ...

    def bounce(self, source: Tensor) -> Tensor:
        """The bytes of `source` on the device, until the next call."""
        ...

    def place(self, target: Tensor, found: Tensor) -> None:
        """target becomes `found`, a view of the bounce buffer; a cast and other strides are allowed."""
        ...

    def sent(self) -> None:
        """All copies from the slot are on their way."""
        ...


class CudaLane:
    """A Lane on a CUDA device; see Lane."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream):
        self._device, self._stream = device, stream
        self._slots: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0
        self._bounce: Tensor | None = None

    def slot(self) -> Tensor:
        self._turn += 1
        if len(self._slots) < 2:  # pinned one by one, so that readers begin while others still pin
            pinned = torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=True)
            self._slots.append((pinned, torch.cuda.Event()))
            return pinned
        held, event = self._slots[(self._turn - 1) % 2]
        event.synchronize()
        return held

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def bounce(self, source: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            if self._bounce is None:
                self._bounce = torch.empty(SLOT_BYTES, dtype=torch.uint8, device=self._device)
            self._bounce[: source.numel()].copy_(source, non_blocking=True)
            return self._bounce[: source.numel()]

    def place(self, target: Tensor, found: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(found)

    def sent(self) -> None:
        self._slots[(self._turn - 1) % 2][1].record(self._stream)


def send(extent: Extent, lane: Lane, tensors: Mapping[str, Tensor], shards: Shards) -> None:
    """Reads an extent into the lane's slot and sets off the copies to all its places."""
    slot = lane.slot()
    read_into(shards.descriptor(extent.file), raw_bytes(slot)[: extent.nbytes], extent.offset, extent.file)
    for job in extent.jobs:
        begin = offset_of(job) - extent.offset
        source, target = slot[begin : begin + job.nbytes], tensors[job.target]
        match job:
            case Run():
                lane.copy(target.view(-1).view(torch.uint8)[job.start : job.start + job.nbytes], source)
            case Staged():
                _place(job, lane, target, source)
    lane.sent()


@contextmanager
def cuda_lanes(device: torch.device) -> Iterator[SimpleQueue[Lane]]:
    """READERS lanes to a CUDA device; at the end all that they sent has arrived."""
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    lanes: SimpleQueue[Lane] = SimpleQueue()
    for stream in streams:
        stream.wait_stream(current)  # the targets' memory may still be in use there
    for number in range(READERS):
        lanes.put(CudaLane(device, streams[number % STREAMS]))
    try:
        yield lanes
    finally:
        for stream in streams:
            stream.synchronize()


def _place(job: Staged, lane: Lane, target: Tensor, source: Tensor) -> None:
    block, dtype = job.block, torch_dtype(job.info.dtype)
    whole = job.nbytes // ITEM_BYTES[job.info.dtype]
    found = lane.bounce(source).view(dtype)[:whole].as_strided(block.shape, block.stored_strides)
    lane.place(target.as_strided(block.shape, block.strides, block.offset), found)
