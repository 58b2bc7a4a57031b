"""Filling tensors on a GPU: readers fill pinned slots from the files, and copies go on while they read the next ones.

Each reader has a lane of its own: slots of pinned memory, a stream, and a bounce buffer on the device for what has to
be cast or rearranged there.  A slot is filled again once the copies from it are done.

What readers do between two reads is kept short, because Python's lock lets one of them at a time do it: a copy is one
call of the driver, which keeps the lock; torch's own `copy_` gives it up, and a dozen readers then wait for each other.
"""

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.checkpoint.extents import Extent, offset_of
from moebius.checkpoint.jobs import Run, Staged
from moebius.checkpoint.pages import make_present
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype
from moebius.errors import CapacityError

DRIVER = "libcuda.so.1"
SLOT_BYTES = 12 << 20
READERS = 16
PINNING_THREADS = 4
SLOTS_A_READER = 1  # a reader that waits for its copies costs less than slots that no longer fit the processors' cache
STREAMS = 2


class Slot(NamedTuple):
    """SLOT_BYTES of host memory (uint8), and the same as Python's buffers see it."""

    tensor: Tensor
    memory: memoryview


class Lane(Protocol):
    """One reader's way to the device; what it does happens in order, perhaps later."""

    def slot(self) -> Slot:
        """A slot from which every earlier copy is done."""
        ...

    def copy(self, target: Tensor, start: int, begin: int, nbytes: int) -> None:
        """The bytes of `target`, on the device, from `start` on become those of the slot from `begin` on."""
        ...

    def place(self, target: Tensor, source: Tensor, strides: tuple[int, ...]) -> None:
        """target, a view on the device, becomes `source`, flat elements of the slot at these strides, cast."""
        ...

    def sent(self) -> None:
        """All copies from the slot are on their way."""
        ...


def send(extent: Extent, lane: Lane, tensors: Mapping[str, Tensor], shards: Shards) -> None:
    """Reads an extent into the lane's slot and sets off the copies to all its places."""
    slot = lane.slot()
    read_into(shards.descriptor(extent.file), slot.memory[: extent.nbytes], extent.offset, extent.file)
    for job in extent.jobs:
        begin = offset_of(job) - extent.offset
        match job:
            case Run():
                lane.copy(tensors[job.target], job.start, begin, job.nbytes)
            case Staged():
                _place(job, lane, tensors[job.target], slot.tensor[begin : begin + job.nbytes])
    lane.sent()


def _place(job: Staged, lane: Lane, target: Tensor, source: Tensor) -> None:
    block, dtype = job.block, torch_dtype(job.info.dtype)
    if source.storage_offset() % dtype.itemsize:
        source = source.clone()  # a file may begin its tensors anywhere
    lane.place(target.as_strided(block.shape, block.strides, block.offset), source.view(dtype), block.stored_strides)


class PinnedSlots:
    """Slots that threads of their own pin one by one: they go on while the files are planned."""

    def __init__(self) -> None:
        self._ready: SimpleQueue[Slot | BaseException] = SimpleQueue()
        for _ in range(PINNING_THREADS):
            Thread(target=self._pin, name="moebius-pinning", daemon=True).start()

    def take(self) -> Slot:
        """The next slot; waits for it."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _pin(self) -> None:
        for _ in range(READERS * SLOTS_A_READER // PINNING_THREADS):
            try:
                tensor = _pinned(SLOT_BYTES)
                self._ready.put(Slot(tensor, raw_bytes(tensor)))
            except BaseException as error:  # noqa: BLE001  # raised in each thread that waits for a slot
                self._ready.put(error)


def _pinned(nbytes: int) -> Tensor:
    """Pinned memory, given back with the tensor.

    By the driver, because torch keeps Python's lock while it pins; and registered once its pages are present, because
    the driver alone makes them on one processor, in three times the time.
    """
    torch.cuda.current_stream().synchronize()  # gives this thread the device's context
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    make_present(tensor)
    driver, pointer = ctypes.CDLL(DRIVER), ctypes.c_void_p(tensor.data_ptr())
    error = driver.cuMemHostRegister_v2(pointer, ctypes.c_size_t(nbytes), 0)
    if error:
        raise CapacityError(f"{nbytes:,} bytes of memory cannot be pinned: the CUDA driver says error {error}")
    weakref.finalize(tensor, driver.cuMemHostUnregister, pointer)
    return tensor


class CudaLane:
    """A Lane on a CUDA device, for the thread that makes it."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, slots: PinnedSlots):
        torch.cuda.set_device(device)  # of this thread
        self._stream, self._unused = stream, slots
        self._slots: list[tuple[Slot, torch.cuda.Event]] = []
        self._turn = -1

    def slot(self) -> Slot:
        self._turn += 1
        if self._turn < SLOTS_A_READER:
            self._slots.append((self._unused.take(), torch.cuda.Event()))
        held, event = self._slots[self._turn % SLOTS_A_READER]
        if not event.query():
            event.synchronize()
        return held

    def copy(self, target: Tensor, start: int, begin: int, nbytes: int) -> None:
        source = self._slots[self._turn % SLOTS_A_READER][0].tensor.data_ptr() + begin
        error = _copy_to_device()(target.data_ptr() + start, source, nbytes, self._stream.cuda_stream)
        if error:
            raise RuntimeError(f"the CUDA driver refused to copy {nbytes} bytes to {target.device}: error {error}")

    def place(self, target: Tensor, source: Tensor, strides: tuple[int, ...]) -> None:
        with torch.cuda.stream(self._stream):
            bounce = source.to(target.device, non_blocking=True)
            target.copy_(bounce.as_strided(target.shape, strides))

    def sent(self) -> None:
        self._slots[self._turn % SLOTS_A_READER][1].record(self._stream)


@cache
def _copy_to_device():  # a foreign function
    """cuMemcpyHtoDAsync(device address, host address, bytes, stream), called without giving up Python's lock."""
    function = ctypes.PyDLL(DRIVER).cuMemcpyHtoDAsync_v2
    function.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function


@contextmanager
def cuda_streams(device: torch.device) -> Iterator[list[torch.cuda.Stream]]:
    """Streams for lanes to a device; at the end all that was sent on them has arrived."""
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_stream(current)  # the targets' memory may still be in use there
    try:
        yield streams
    finally:
        for stream in streams:
            stream.synchronize()
