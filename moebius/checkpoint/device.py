"""Filling tensors on a GPU: readers fill pinned slots from the files, and copies go on while they read the next ones.

Slots go round among the readers, and from one GPU to the next: one is filled again once the copies from it are done.
Each reader has a lane of its own: a stream, and a bounce buffer on the device for what has to be cast or rearranged
there.

What readers do between two reads is kept short, because Python's lock lets one of them at a time do it: a copy is one
call of the driver, which keeps the lock; torch's own `copy_` gives it up, and a dozen readers then wait for each other.
"""

import ctypes
import mmap
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle
from queue import Empty, SimpleQueue
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
SLOTS = READERS  # a reader that waits for copies costs less than slots that no longer fit the processors' cache
PINNING_THREADS = 4
PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every GPU
STREAMS = 2

Event = torch.cuda.Event | torch.Event


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

    def wait(self, event: Event) -> None:
        """What is copied from now on waits for what the event stands for."""
        ...

    def sent(self) -> Event:
        """All copies from the slot are on their way; the event is that they, and those before, have been done."""
        ...


class Feed(Protocol):
    """Lanes to a device, and their order with what the thread that computes there sets off."""

    slot_bytes: int
    device: torch.device

    def lane(self) -> Lane:
        """For the thread that asks."""
        ...

    def wait(self, events: Iterable[Event]) -> None:
        """What this thread sets off from now on waits for what the events stand for."""
        ...

    def mark(self) -> Event:
        """The event that all that this thread has set off is done."""
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


class Slots:
    """Slots that go round; threads that wait for one get it in turn."""

    def __init__(self) -> None:
        self._free: SimpleQueue[tuple[Slot, Event | None] | BaseException] = SimpleQueue()

    def take(self) -> Slot:
        """A slot from which every earlier copy is done; waits for it.  Raises what kept one from being made."""
        found = self._free.get()
        if isinstance(found, BaseException):
            raise found
        return _free_again(*found)

    def give(self, slot: Slot, copied: Event | None = None) -> None:
        """A slot back for others to take, who wait for the event."""
        self._free.put((slot, copied))


def _free_again(slot: Slot, copied: Event | None) -> Slot:
    if copied is not None and not copied.query():
        copied.synchronize()
    return slot


class PinnedSlots(Slots):
    """Slots that threads of their own pin one by one: they go on while the files are planned."""

    def __init__(self) -> None:
        super().__init__()
        for _ in range(PINNING_THREADS):
            Thread(target=self._pin, name="moebius-pinning", daemon=True).start()

    def _pin(self) -> None:
        for _ in range(SLOTS // PINNING_THREADS):
            try:
                tensor = _pinned(SLOT_BYTES)
                self.give(Slot(tensor, raw_bytes(tensor)))
            except BaseException as error:  # noqa: BLE001  # raised in each thread that waits for a slot
                self._free.put(error)

    def unpin(self) -> None:
        """Gives the slots' memory back, on threads that only the interpreter's end waits for."""
        for _ in range(PINNING_THREADS):
            Thread(target=self._unpin, name="moebius-unpinning").start()

    def _unpin(self) -> None:
        _enter_context()
        with suppress(Empty):
            while isinstance(found := self._free.get_nowait(), tuple):
                _free_again(*found)


def _pinned(nbytes: int) -> Tensor:
    """Pinned memory, given back with the tensor.

    By the driver, because torch keeps Python's lock while it pins; and registered once its pages are present, because
    the driver alone makes them on one processor, in three times the time.
    """
    _enter_context()
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    make_present(tensor)
    driver, pointer = ctypes.CDLL(DRIVER), ctypes.c_void_p(tensor.data_ptr())
    error = driver.cuMemHostRegister_v2(pointer, ctypes.c_size_t(nbytes), PORTABLE)
    if error:
        raise CapacityError(f"{nbytes:,} bytes of memory cannot be pinned: the CUDA driver says error {error}")
    weakref.finalize(tensor, driver.cuMemHostUnregister, pointer)
    return tensor


def _enter_context() -> None:
    """Gives this thread a device's context, without which the driver neither pins nor unpins."""
    torch.cuda.current_stream().synchronize()


class CudaLane:
    """A Lane on a CUDA device, for the thread that makes it."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, slots: Slots):
        torch.cuda.set_device(device)  # of this thread
        self._stream, self._slots = stream, slots
        self._held: Slot

    def slot(self) -> Slot:
        self._held = self._slots.take()
        return self._held

    def copy(self, target: Tensor, start: int, begin: int, nbytes: int) -> None:
        _copy(target, start, self._held, begin, nbytes, self._stream)

    def place(self, target: Tensor, source: Tensor, strides: tuple[int, ...]) -> None:
        with torch.cuda.stream(self._stream):
            bounce = source.to(target.device, non_blocking=True)
            target.copy_(bounce.as_strided(target.shape, strides))

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)

    def sent(self) -> Event:
        copied = self._stream.record_event()
        self._slots.give(self._held, copied)
        return copied


class CudaFeed:
    """A Feed to a CUDA device, from lanes on `streams` to the current stream."""

    slot_bytes = SLOT_BYTES

    def __init__(self, device: torch.device, streams: Sequence[torch.cuda.Stream], slots: Slots):
        self.device, self._slots = device, slots
        self._streams, self._current = cycle(streams), torch.cuda.current_stream(device)

    def lane(self) -> CudaLane:
        return CudaLane(self.device, next(self._streams), self._slots)

    def wait(self, events: Iterable[Event]) -> None:
        for event in events:
            self._current.wait_event(event)

    def mark(self) -> Event:
        return self._current.record_event()


def _copy(target: Tensor, start: int, slot: Slot, begin: int, nbytes: int, stream: torch.cuda.Stream) -> None:
    """Sets off a copy of a slot's bytes from `begin` on to those of `target`, on the device, from `start` on."""
    error = _copy_to_device()(target.data_ptr() + start, slot.tensor.data_ptr() + begin, nbytes, stream.cuda_stream)
    if error:
        raise RuntimeError(f"the CUDA driver refused to copy {nbytes} bytes to {target.device}: error {error}")


@cache
def _copy_to_device():  # a foreign function
    """cuMemcpyHtoDAsync(device address, host address, bytes, stream), called without giving up Python's lock."""
    function = ctypes.PyDLL(DRIVER).cuMemcpyHtoDAsync_v2
    function.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function


@contextmanager
def cuda_feed(device: torch.device, slots: Slots) -> Iterator[CudaFeed]:
    """A feed to a device, the current one meanwhile; at the end all that was sent has arrived."""
    with torch.cuda.device(device):
        device = torch.device("cuda", torch.cuda.current_device())  # with its index
        streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
        feed = CudaFeed(device, streams, slots)
        for stream in streams:
            stream.wait_event(feed.mark())  # the targets' memory may still be in use there
        try:
            yield feed
        finally:
            for stream in streams:
                stream.synchronize()
