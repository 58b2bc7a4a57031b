"""Weights that are quantized on a GPU while they are read: slabs that are alike are quantized at once, in few launches.

Readers put slabs together in pinned slots.  One thread, the caller's, copies each slab to its row of a batch on the
device and gives the slot back; a batch that is full is quantized at once, and its values and scales go to their places.
Only this thread talks to the device: launches from many would wait for each other, and for the readers, at Python's
lock.  In a batch slabs share nothing, so the bits are those of each slab by itself.

n slabs a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.checkpoint.decoding import ReadInto
from moebius.checkpoint.device import Feed, Slot
from moebius.checkpoint.encodings import Encoded
from moebius.checkpoint.files import ITEM_BYTES
from moebius.checkpoint.packing import Slab, nan_faults, places, put_together, read_packed, slabs
from moebius.checkpoint.planning import PACKING_BYTES, Pack
from moebius.checkpoint.pool import run_all
from moebius.checkpoint.reading import torch_dtype
from moebius.errors import Fault
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import Form

OPEN_BATCHES = 3  # experts' gate and up matrices are alike, their down matrices are not, and others lie between layers
ARITHMETIC_BYTES = {"int4_pack": 14, "int8_row": 6, "fp8_block": 13, "mxfp4": 25}  # an element, the results included
LOOK_SECONDS = 0.05  # between two looks whether readers have stopped


def read_batched(
    packs: Sequence[Pack],
    tensors: Mapping[str, Tensor],
    read_into: ReadInto,
    feed: Feed,
    *,
    threads: int = 0,
    advance: Callable[[int], None] = lambda nbytes: None,
    look_for_nan: bool = False,
) -> list[Fault]:
    """As `read_packed`, in batches, on the device that `feed` leads to, of which it takes PACKING_BYTES meanwhile.

    What is stored in another form, or has a quantum that no slot holds, is quantized slab by slab.
    Raises the first error, of a reader or of this thread, once every thread has stopped.
    """
    batched, alone = [], []
    for pack in packs:
        (batched if _fits(pack, feed) else alone).append(pack)
    faults = read_packed(alone, tensors, read_into, advance=advance, look_for_nan=look_for_nan)
    batches = _Batches(tensors, feed, look_for_nan)

    def fill(slab: Slab) -> Slot:
        slot = _filled(slab, feed, read_into)
        advance(slab.nbytes)
        return slot

    todo = (slab for pack in batched for slab in _slabs(pack, feed))
    _read_ahead(todo, fill, batches.add, feed.give, threads)
    batches.finish()
    return [*faults, *nan_faults(batched, batches.with_nan())]


def _fits(pack: Pack, feed: Feed) -> bool:
    if isinstance(pack.info, Encoded):
        return False
    return pack.form.quantum_rows * pack.shape[-1] * ITEM_BYTES[pack.info.dtype] <= feed.slot_bytes


def _slabs(pack: Pack, feed: Feed) -> Iterator[Slab]:
    """As large as a slot and a batch hold."""
    nbytes = min(feed.slot_bytes, _batch_elements(pack) * ITEM_BYTES[pack.info.dtype])
    return slabs(pack, lambda part: nbytes)


def _batch_elements(pack: Pack) -> int:
    return PACKING_BYTES // (ARITHMETIC_BYTES[pack.form.name] + OPEN_BATCHES * ITEM_BYTES[pack.info.dtype])


# --- reading ahead ---------------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    """Ends readers of which nobody wants more."""


def _filled(slab: Slab, feed: Feed, read_into: ReadInto) -> Slot:
    slot = feed.take()
    try:
        put_together(slab, slot.memory[: slab.nbytes], read_into)
    except BaseException:
        feed.give(slot)
        raise
    return slot


def _read_ahead(
    todo: Iterator[Slab],
    fill: Callable[[Slab], Slot],
    use: Callable[[Slab, Slot], None],
    give: Callable[[Slot], None],
    threads: int,
) -> None:
    """use(slab, fill(slab)) for every slab: fill on threads of their own, use on this one, as slots come."""
    if threads == 0:
        for slab in todo:
            use(slab, fill(slab))
        return
    readers = _Readers(todo, fill, threads)
    try:
        for slab, slot in readers.filled():
            use(slab, slot)
    except BaseException:
        readers.stop(give)
        raise


class _Readers:
    """Threads that fill slots ahead of the one that uses them."""

    def __init__(self, todo: Iterator[Slab], fill: Callable[[Slab], Slot], threads: int):
        self._todo, self._fill, self._threads = todo, fill, threads
        self._filled = SimpleQueue[tuple[Slab, Slot] | None]()
        self._stopped, self._errors = Event(), list[BaseException]()
        self._thread = Thread(target=self._read_all, name="moebius-readers", daemon=True)
        self._thread.start()

    def filled(self) -> Iterator[tuple[Slab, Slot]]:
        """As they come.  Raises the first error once no thread reads any more."""
        yield from iter(self._filled.get, None)
        if self._errors:
            raise self._errors[0]

    def stop(self, give: Callable[[Slot], None]) -> None:
        """Waits until no thread reads any more; they may be waiting for the slots that this gives back."""
        self._stopped.set()
        while self._thread.is_alive():
            with suppress(Empty):
                if found := self._filled.get(timeout=LOOK_SECONDS):
                    give(found[1])

    def _read_all(self) -> None:
        try:
            run_all(self._todo, self._read, self._threads)
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
            self._errors.append(error)
        finally:
            self._filled.put(None)

    def _read(self, slab: Slab) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._filled.put((slab, self._fill(slab)))


# --- batches ---------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What slabs of one batch have in common."""

    form: Form
    rows: int
    width: int
    dtype: str


@dataclass(frozen=True)
class _Batch:
    """rows: [n, rows, in] on the device, of which the first are filled, from `slabs`."""

    rows: Tensor
    slabs: list[Slab] = field(default_factory=list)


class _Batches:
    def __init__(self, tensors: Mapping[str, Tensor], feed: Feed, look_for_nan: bool):
        self._tensors, self._feed, self._look_for_nan = tensors, feed, look_for_nan
        self._open: dict[_Kind, _Batch] = {}
        self._looked: list[tuple[list[Slab], Tensor]] = []

    def add(self, slab: Slab, slot: Slot) -> None:
        """Copies a slab to its batch, which is quantized if it is full; the slot goes back in any case."""
        kind = _Kind(slab.pack.form, slab.rows, slab.pack.shape[-1], slab.pack.info.dtype)
        try:
            batch = self._batch(kind, slab)
            self._feed.copy(batch.rows, len(batch.slabs) * slab.nbytes, slot, slab.nbytes)
        finally:
            self._feed.give(slot)
        batch.slabs.append(slab)
        if len(batch.slabs) == len(batch.rows):
            self._quantize(self._open.pop(kind))

    def finish(self) -> None:
        """Quantizes what is left."""
        while self._open:
            self._quantize(self._oldest())

    def with_nan(self) -> set[str]:
        """The stored tensors in which NaN was found; waits for the device."""
        return {slab.pack.info.name for batch, nan in self._looked for slab in compress(batch, nan.tolist())}

    def _batch(self, kind: _Kind, slab: Slab) -> _Batch:
        if kind not in self._open:
            if len(self._open) == OPEN_BATCHES:
                self._quantize(self._oldest())
            n = max(1, _batch_elements(slab.pack) // (kind.rows * kind.width))
            device = self._tensors[slab.pack.name].device
            rows = torch.empty((n, kind.rows, kind.width), dtype=torch_dtype(kind.dtype), device=device)
            self._open[kind] = _Batch(rows)
        return self._open[kind]

    def _oldest(self) -> _Batch:
        return self._open.pop(next(iter(self._open)))

    def _quantize(self, batch: _Batch) -> None:
        rows = batch.rows[: len(batch.slabs)]
        values, scales = quantize(batch.slabs[0].pack.form, rows)
        for slab, *found in zip(batch.slabs, values, scales, strict=True):
            for place, quantized in zip(places(slab, self._tensors), found, strict=True):
                place.copy_(quantized)
        if self._look_for_nan:
            self._looked.append((batch.slabs, rows.isnan().flatten(1).any(dim=1)))
