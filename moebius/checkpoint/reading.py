"""Bytes from shards to memory: files that are sure to be those that were planned, and positional reads."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

import torch

from moebius.checkpoint.files import ShardFile, TensorInfo
from moebius.errors import CheckpointError

MAX_IO_BYTES = 1 << 30  # the kernel reads and writes at most 2 GiB at once


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class Shards:
    """The shards of a plan, each opened when it is first asked for; a context that closes them."""

    def __init__(self, shards: Iterable[ShardFile]):
        self._files = {shard.path.name: shard for shard in shards}
        self._descriptors: dict[str, int] = {}
        self._stack, self._lock = ExitStack(), Lock()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def descriptor(self, file: str) -> int:
        """Of the shard with this file name."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = self._stack.enter_context(opened(self._files[file]))
            return self._descriptors[file]

    def check(self) -> None:
        """Raises CheckpointError if a file that was read is not any more what it was when its header was read."""
        for file, descriptor in self._descriptors.items():
            _check_identity(self._files[file], descriptor)

    def read_into(self, info: TensorInfo, place: memoryview, start: int) -> None:
        """Fills `place` from byte `start` of a tensor on."""
        read_into(self.descriptor(info.file), place, info.offset + start, info.file)


@contextmanager
def opened(shard: ShardFile) -> Iterator[int]:
    """A descriptor of the shard, once it is sure that it is the file that was planned."""
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_identity(shard, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_identity(shard: ShardFile, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_ino, status.st_mtime_ns) != shard.identity or status.st_size != shard.size:
        raise changed(shard.path, "it is another file than when its header was read")


def changed(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was loaded: {detail}; no model was made",
        advice="load again when nothing writes to it",
    )


def read_into(descriptor: int, place: memoryview, offset: int, file: str) -> None:
    """Fills `place` from the file; the kernel may hand it over in several pieces."""
    done = 0
    while done < len(place):
        count = os.preadv(descriptor, [place[done : done + MAX_IO_BYTES]], offset + done)
        if count == 0:
            raise changed(Path(file), f"it ends at byte {offset + done}, before all of its tensors were read")
        done += count
