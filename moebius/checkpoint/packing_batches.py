"""Weights that are quantized on a GPU while they are read: matrices that lie near each other in a file at once.

The weights, in the files' order, are dealt to windows of so many stored bytes.  Readers fill pinned slots with
stretches of the file, whatever tensors lie in them, and send each to its place in the window's buffer on the device, in
one copy.  Once all of a window has been sent, the caller's thread quantizes it: matrices that are alike are views of
the buffer, n at once, and their values and scales go to their places.  Meanwhile readers fill the next buffers.

So Python's lock, at which readers and the quantizing thread wait for each other, is needed a few times a window, not a
few times a matrix.  Matrices share nothing, so the bits are those of each by itself; a weight that is stored transposed
or with alternating rows is a view of the buffer, too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from queue import SimpleQueue
from threading import Condition, Lock, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.checkpoint.device import Event, Feed, Lane
from moebius.checkpoint.encodings import Encoded
from moebius.checkpoint.files import ITEM_BYTES
from moebius.checkpoint.packing import Slab, nan_faults, places, read_packed, slabs
from moebius.checkpoint.planning import DEVICE_PACKING_BYTES, Pack
from moebius.checkpoint.reading import Shards, read_into, torch_dtype
from moebius.errors import Fault
from moebius.quantization.decoding import quantize

WINDOW_BYTES = 36 << 20  # three slots: enough matrices for the launches to cost little, few enough for their arithmetic
WINDOWS = 3  # one is quantized, two are filled
QUANTIZING_BYTES = DEVICE_PACKING_BYTES - WINDOWS * WINDOW_BYTES
ARITHMETIC_BYTES = {"int4_pack": 14, "int8_row": 6, "fp8_block": 13, "mxfp4": 25}  # an element, the results included
ALIGNMENT = 16  # bytes: of stretches in a buffer, so that their elements can be viewed there


def read_batched(
    packs: Sequence[Pack],
    tensors: Mapping[str, Tensor],
    shards: Shards,
    feed: Feed,
    *,
    threads: int = 0,
    advance: Callable[[int], None] = lambda nbytes: None,
    look_for_nan: bool = False,
) -> list[Fault]:
    """As `read_packed`, in windows, on the feed's device, of which it takes DEVICE_PACKING_BYTES meanwhile.

    threads: no more than the feed has slots.  What is stored in another form, or larger than a window, is quantized
    slab by slab.  Raises the first error, of a reader or of this thread, once every thread has stopped.
    """
    alone: list[Pack] = []
    quantizer = _Quantizer(tensors, advance, look_for_nan)
    _read_windows(_windows(packs, alone, feed.slot_bytes), quantizer, shards, feed, threads)
    faults = read_packed(alone, tensors, shards.read_into, advance=advance, look_for_nan=look_for_nan)
    return [*nan_faults(packs, quantizer.with_nan()), *faults]


# --- windows: what lies where in a buffer ----------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A slab as its file holds it: nbytes from byte `offset` on, rows and columns at these strides, in elements."""

    slab: Slab
    offset: int
    nbytes: int
    strides: tuple[int, int]


class _Stretch(NamedTuple):
    """nbytes of a file from byte `offset` on, which go to byte `start` of a window's buffer."""

    file: str
    offset: int
    nbytes: int
    start: int

    @property
    def end(self) -> int:
        """In the file."""
        return self.offset + self.nbytes

    def pieces(self, limit: int) -> "Iterator[_Stretch]":
        """The stretch in pieces of at most so many bytes."""
        for done in range(0, self.nbytes, limit):
            yield _Stretch(self.file, self.offset + done, min(limit, self.nbytes - done), self.start + done)


@dataclass
class _Window:
    """slabs: each with its first byte in the buffer.  pieces: what readers send.  events: those of pieces sent."""

    number: int
    stretches: list[_Stretch] = field(default_factory=list)
    slabs: list[tuple[_Stored, int]] = field(default_factory=list)
    pieces: list[_Stretch] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, stored: _Stored) -> bool:
        """Takes a slab in, unless there is no room for it."""
        last = self.stretches[-1] if self.stretches else None
        longer = last and _prolonged(last, stored)
        stretch = longer or _begun(last, stored)
        if stretch.start + stretch.nbytes > WINDOW_BYTES:
            return False
        self.stretches[-1 if longer else len(self.stretches) :] = [stretch]
        self.slabs.append((stored, stretch.start + stored.offset - stretch.offset))
        return True

    def cut(self, limit: int) -> "_Window":
        """The same, with pieces of at most so many bytes."""
        self.pieces = [piece for stretch in self.stretches for piece in stretch.pieces(limit)]
        return self


def _prolonged(stretch: _Stretch, stored: _Stored) -> _Stretch | None:
    """The stretch and a slab that begins in it, or right after it, and can be viewed there."""
    info = stored.slab.pack.info
    near = info.file == stretch.file and stretch.offset <= stored.offset <= stretch.end
    if not near or (stored.offset - stretch.offset) % ITEM_BYTES[info.dtype]:
        return None
    return stretch._replace(nbytes=max(stretch.end, stored.offset + stored.nbytes) - stretch.offset)


def _begun(last: _Stretch | None, stored: _Stored) -> _Stretch:
    """A stretch for a slab, after the last one in the buffer."""
    start = _aligned(last.start + last.nbytes) if last else 0
    return _Stretch(stored.slab.pack.info.file, stored.offset, stored.nbytes, start)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _windows(packs: Sequence[Pack], alone: list[Pack], slot_bytes: int) -> Iterator[_Window]:
    """The packs in windows, as they are asked for; those that do not fit are added to `alone`."""
    window = _Window(0)
    for stored in _all_stored(packs, alone):
        if not window.add(stored):
            yield window.cut(slot_bytes)
            window = _Window(window.number + 1)
            window.add(stored)
    yield window.cut(slot_bytes)


def _all_stored(packs: Sequence[Pack], alone: list[Pack]) -> Iterator[_Stored]:
    for pack in packs:
        found = [] if isinstance(pack.info, Encoded) else sorted(map(_stored, _slabs(pack)), key=_offset)
        if found and all(_fits(stored) for stored in found):
            yield from found
        else:
            alone.append(pack)


def _offset(stored: _Stored) -> int:
    return stored.offset


def _fits(stored: _Stored) -> bool:
    pack = stored.slab.pack
    return stored.nbytes <= WINDOW_BYTES and stored.slab.rows * pack.shape[-1] <= _elements(pack)


def _slabs(pack: Pack) -> Iterator[Slab]:
    nbytes = min(WINDOW_BYTES, _elements(pack) * ITEM_BYTES[pack.info.dtype])
    return slabs(pack, lambda part: nbytes)


def _elements(pack: Pack) -> int:
    """How many can be quantized at once; views of the buffer are copied together for that."""
    return QUANTIZING_BYTES // (ARITHMETIC_BYTES[pack.form.name] + ITEM_BYTES[pack.info.dtype])


def _stored(slab: Slab) -> _Stored:
    info, origin, size = slab.pack.info, slab.part.origin, ITEM_BYTES[slab.pack.info.dtype]
    start, strides = slab.part.place.strided(info.shape)
    along = dict(zip(origin.axes, zip(origin.steps, strides, strict=True), strict=True))
    for axis, index in enumerate((*slab.at, slab.first)):
        step, stride = along.get(axis, (1, 0))
        start += (index - origin.start[axis]) // step * stride
    down, across = (along.get(len(slab.at) + axis, (1, 1))[1] for axis in range(2))
    length = 1 + (slab.rows - 1) * down + (slab.pack.shape[-1] - 1) * across
    return _Stored(slab, info.offset + start * size, length * size, (down, across))


# --- reading ahead ---------------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    """Ends readers of which nobody wants more."""


class _Buffers:
    """WINDOWS buffers on the device, which windows have in turn."""

    def __init__(self, feed: Feed):
        nbytes, turns = _aligned(WINDOW_BYTES), range(WINDOWS)
        self._memory = [torch.empty(nbytes, dtype=torch.uint8, device=feed.device) for _ in turns]
        self._free = [(number, feed.mark()) for number in turns]  # for which window, once what has passed
        self._changed, self._stopped = Condition(), False

    def of(self, window: _Window) -> Tensor:
        return self._memory[window.number % WINDOWS]

    def free_for(self, window: _Window) -> Event:
        """Waits until all that used the window's buffer is set off; gives what copies to it have to wait for."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn(window)[0] == window.number)
            if self._stopped:
                raise _StoppedError
            return self._turn(window)[1]

    def give(self, window: _Window, used: Event) -> None:
        """The window's buffer to the next one."""
        with self._changed:
            self._free[window.number % WINDOWS] = (window.number + WINDOWS, used)
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _turn(self, window: _Window) -> tuple[int, Event]:
        return self._free[window.number % WINDOWS]


def _read_windows(
    windows: Iterator[_Window], quantizer: "_Quantizer", shards: Shards, feed: Feed, threads: int
) -> None:
    """Quantizes every window on this thread, once readers, threads of their own if there are any, have sent it."""
    buffers = _Buffers(feed)

    def sent(window: _Window, event: Event) -> None:
        window.events.append(event)
        if len(window.events) == len(window.pieces):
            feed.wait(window.events)
            quantizer.quantize(window, buffers.of(window))
            buffers.give(window, feed.mark())

    todo = ((window, piece) for window in windows for piece in window.pieces)
    if threads == 0:
        lane = feed.lane()
        for window, piece in todo:
            sent(window, _send(window, piece, lane, buffers, shards))
        return
    _Readers(todo, shards, feed, buffers, threads).run(sent)


def _send(window: _Window, piece: _Stretch, lane: Lane, buffers: _Buffers, shards: Shards) -> Event:
    """Reads a piece into a slot, and sends it to its place in the window's buffer once that is free."""
    slot = lane.slot()
    read_into(shards.descriptor(piece.file), slot.memory[: piece.nbytes], piece.offset, piece.file)
    lane.wait(buffers.free_for(window))
    lane.copy(buffers.of(window), piece.start, 0, piece.nbytes)
    return lane.sent()


class _Readers:
    """Threads that send pieces, begun in their order, ahead of the one that quantizes.

    Each has one slot at a time, and there are as many as threads: who waits for a buffer keeps nobody from sending the
    pieces before, for which the buffer is waiting.
    """

    def __init__(
        self,
        todo: Iterator[tuple[_Window, _Stretch]],
        shards: Shards,
        feed: Feed,
        buffers: _Buffers,
        threads: int,
    ):
        self._todo, self._shards, self._feed, self._buffers = todo, shards, feed, buffers
        self._lock, self._errors = Lock(), list[BaseException]()
        self._sent = SimpleQueue[tuple[_Window, Event] | None]()
        self._threads = [Thread(target=self._read, name="moebius-reader", daemon=True) for _ in range(threads)]

    def run(self, sent: Callable[[_Window, Event], None]) -> None:
        """sent(window, event) for every piece, on this thread.  Raises the first error, once all have stopped."""
        try:
            for thread in self._threads:
                thread.start()
            for _ in self._threads:
                for window, event in iter(self._sent.get, None):
                    sent(window, event)
        except BaseException:
            self._buffers.stop()
            raise
        finally:
            for thread in filter(Thread.is_alive, self._threads):
                thread.join()
        if self._errors:
            raise self._errors[0]

    def _read(self) -> None:
        try:
            lane = self._feed.lane()
            while (piece := self._next()) is not None:
                window, stretch = piece
                self._sent.put((window, _send(window, stretch, lane, self._buffers, self._shards)))
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
            self._errors.append(error)  # before others stop, so that it is the first
            self._buffers.stop()
        finally:
            self._sent.put(None)

    def _next(self) -> tuple[_Window, _Stretch] | None:
        with self._lock:
            return next(self._todo, None)


# --- quantizing ------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What slabs that are quantized together have in common: the same rows of matrices of one weight."""

    name: str
    dtype: str
    first: int
    rows: int
    strides: tuple[int, int]


class _Quantizer:
    """Quantizes windows into the places of their values and scales."""

    def __init__(self, tensors: Mapping[str, Tensor], advance: Callable[[int], None], look_for_nan: bool):
        self._tensors, self._advance, self._look_for_nan = tensors, advance, look_for_nan
        self._looked: list[tuple[list[str], Tensor]] = []

    def quantize(self, window: _Window, buffer: Tensor) -> None:
        kinds: dict[_Kind, list[tuple[_Stored, int]]] = defaultdict(list)
        for stored, position in window.slabs:
            kinds[_kind(stored)].append((stored, position))
        for alike in kinds.values():
            slab = alike[0][0].slab
            n = _elements(slab.pack) // (slab.rows * slab.pack.shape[-1])
            for begin in range(0, len(alike), n):
                self._quantize(alike[begin : begin + n], buffer)
        self._advance(sum(stored.slab.nbytes for stored, _ in window.slabs))

    def with_nan(self) -> set[str]:
        """The stored tensors in which NaN was found; waits for the device."""
        return {name for names, nan in self._looked for name in compress(names, nan.tolist())}

    def _quantize(self, alike: Sequence[tuple[_Stored, int]], buffer: Tensor) -> None:
        slabs, rows = [stored.slab for stored, _ in alike], _rows(alike, buffer)
        if self._look_for_nan:
            self._looked.append(([slab.pack.info.name for slab in slabs], rows.isnan().flatten(1).any(dim=1)))
        found = quantize(slabs[0].pack.form, rows)
        for begin, end in _consecutive([slab.matrix for slab in slabs]):
            for place, quantized in zip(places(slabs[begin], self._tensors, end - begin), found, strict=True):
                place.copy_(quantized[begin:end])


def _kind(stored: _Stored) -> _Kind:
    slab = stored.slab
    return _Kind(slab.pack.name, slab.pack.info.dtype, slab.first, slab.rows, stored.strides)


def _rows(alike: Sequence[tuple[_Stored, int]], buffer: Tensor) -> Tensor:
    """Slabs of one kind, [n, rows, in]: a view of the buffer if they lie there at equal distances."""
    (first, begin), slab = alike[0], alike[0][0].slab
    elements, size = buffer.view(torch_dtype(slab.pack.info.dtype)), ITEM_BYTES[slab.pack.info.dtype]
    shape, starts = (slab.rows, slab.pack.shape[-1]), [position // size for _, position in alike]
    distances = {after - before for before, after in pairwise(starts)} or {0}
    if len(distances) == 1:
        return elements.as_strided((len(alike), *shape), (*distances, *first.strides), begin // size)
    return torch.stack([elements.as_strided(shape, first.strides, start) for start in starts])


def _consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of the stretches of numbers that follow one upon the other."""
    begin = 0
    for at, (before, after) in enumerate(pairwise(numbers), start=1):
        if after != before + 1:
            yield begin, at
            begin = at
    yield begin, len(numbers)
