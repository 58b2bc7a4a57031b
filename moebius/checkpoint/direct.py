"""New files, written from their first byte to their last; large ones past the page cache.

There the pages would be a second copy of everything, in fresh memory; and since a save waits for the disk anyway,
nothing is won by handing it to the cache first.  Where a file system does not take direct writes (some network ones),
they go through the cache.

A file that several processes fill has its length from the beginning, and takes their bytes in any order, through the
cache: what two of them write may share a block.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from moebius.checkpoint.reading import MAX_IO_BYTES

BLOCK = mmap.PAGESIZE  # direct writes are aligned to it, in memory and in the file
BUFFER_BYTES = 4 << 20
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
LEAST_BYTES = 64 << 20  # a smaller file is done before direct writes pay


class Sink(Protocol):
    """Takes a file's bytes in their order."""

    def write(self, held: memoryview) -> None: ...

    def finish(self) -> int:
        """All is in the file; its length."""
        ...


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[Sink]:
    """A file that is not there yet, of `nbytes`, with the mode that the umask leaves; flushed to the disk."""
    direct = nbytes >= LEAST_BYTES
    try:
        descriptor = _create(path, os.O_DIRECT if direct else 0)
    except OSError as error:
        if not direct or error.errno not in REFUSED:
            raise
        path.unlink(missing_ok=True)  # some file systems refuse direct writes only once the file is there
        direct, descriptor = False, _create(path, 0)
    try:
        sink = Direct(descriptor) if direct else Cached(descriptor)
        yield sink
        if (found := sink.finish()) != nbytes:
            raise AssertionError(f"{path}: {found} bytes were written, expected {nbytes}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sized_file(path: Path, header: bytes, nbytes: int) -> None:
    """A file that is not there yet, of `nbytes`, of which only the header is written."""
    descriptor = _create(path, 0)
    try:
        write_at(descriptor, memoryview(header), 0)
        os.ftruncate(descriptor, nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def standing_file(path: Path) -> Iterator[int]:
    """A descriptor to write to a file that is there; flushed to the disk when the block ends well."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path, flags: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o666)


class Cached:
    """A Sink through the page cache."""

    def __init__(self, descriptor: int):
        self._descriptor, self._end = descriptor, 0

    def write(self, held: memoryview) -> None:
        write_at(self._descriptor, held, self._end)
        self._end += len(held)

    def finish(self) -> int:
        return self._end


class Direct:
    """A Sink for a descriptor with O_DIRECT: whole blocks out of a buffer, then the file is cut to its length."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # at a page's beginning
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._filled, self._written = 0, 0

    def write(self, held: memoryview) -> None:
        found = np.frombuffer(held, np.uint8)
        while len(found):
            taken = found[: BUFFER_BYTES - self._filled]
            self._bytes[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            found = found[len(taken) :]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def finish(self) -> int:
        length = self._written + self._filled
        if self._filled:
            self._filled = -(-self._filled // BLOCK) * BLOCK
            self._flush()
        os.ftruncate(self._descriptor, length)
        return length

    def _flush(self) -> None:
        write_at(self._descriptor, memoryview(self._buffer)[: self._filled], self._written)
        self._written += self._filled
        self._filled = 0


def write_at(descriptor: int, held: memoryview, offset: int) -> None:
    """Writes all of `held`; the kernel may take it in several pieces."""
    done = 0
    while done < len(held):
        done += os.pwrite(descriptor, held[done : done + MAX_IO_BYTES], offset + done)
