"""Runs a plan: each stored tensor is read once, straight into its place in the packed parameters.

What cannot be read into place (a cast, a permutation, another device) goes through one small staging buffer, block by
block, so that memory never holds a tensor twice.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from moebius.checkpoint.blocks import Block, cut, is_run, whole_block
from moebius.checkpoint.files import ITEM_BYTES, ShardFile, TensorInfo
from moebius.checkpoint.planning import STAGING_BYTES, Plan, Read
from moebius.errors import CapacityError, CheckpointError, Fault

MAX_IO_BYTES = 1 << 30  # the kernel reads and writes at most 2 GiB at once


class Progress(Protocol):
    """Told how many bytes will be read, how many were, and that it is over."""

    def start(self, total_bytes: int, label: str) -> None: ...
    def advance(self, nbytes: int) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """A Progress that tells nobody."""

    def start(self, total_bytes: int, label: str) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def finish(self) -> None:
        pass


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def check_room(plan: Plan, device: torch.device) -> None:
    """Raises CapacityError if the plan's peak is more than the device has free now."""
    free = _free_bytes(device)
    if free is not None and plan.peak_bytes > free:
        raise CapacityError(
            f"{plan.files.folder} needs {plan.peak_bytes:,} bytes on {device}, {free:,} are free; no weight was read",
            advice="take a smaller dtype, or a larger device",
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no such file outside Linux: nothing is known, so nothing is refused
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def load(
    plan: Plan,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    check_tensors: bool = False,
) -> dict[str, torch.Tensor]:
    """Reads the plan's tensors: {target name: tensor of the planned shape and dtype, on `device`}.

    check_tensors: also look for NaN in what was read.
    Raises CheckpointError if a file changed since it was planned, ends early, holds NaN (if looked for), or holds a
    tied weight twice with different bytes.  Nothing half-filled is returned.
    """
    tensors = {
        name: torch.empty(target.shape, dtype=torch_dtype(target.dtype), device=device)
        for name, target in plan.targets.items()
    }
    shown = progress or Silent()
    shown.start(plan.bytes_to_read, f"loading {plan.files.folder.name}")
    try:
        _fill(plan, tensors, shown.advance, check_tensors)
    finally:
        shown.finish()
    return tensors


def _fill(plan: Plan, tensors: Mapping[str, torch.Tensor], advance: Callable[[int], None], check: bool) -> None:
    faults: list[Fault] = []
    for shard, reads in _by_shard(plan):
        with opened(shard) as descriptor:
            for read in reads:
                _read(descriptor, read, tensors)
                if check and _has_nan(read, tensors):
                    faults.append(Fault(read.info.name, "NaN", f"in {read.info.file}"))
                advance(read.info.nbytes)
    faults += _compare_doubles(plan, tensors, advance)
    if faults:
        raise CheckpointError(f"bad weights in {plan.files.folder}; no model was made", faults=faults)


def _by_shard(plan: Plan) -> Iterator[tuple[ShardFile, Iterable[Read]]]:
    shards = {shard.path.name: shard for shard in plan.files.shards}
    return ((shards[file], reads) for file, reads in groupby(plan.reads, key=lambda read: read.info.file))


@contextmanager
def opened(shard: ShardFile) -> Iterator[int]:
    """A descriptor of the shard, once it is sure that it is the file that was planned."""
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if (status.st_ino, status.st_mtime_ns) != shard.identity or status.st_size != shard.size:
            raise _changed(shard.path, "it is another file than when its header was read")
        yield descriptor
    finally:
        os.close(descriptor)


def _changed(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was loaded: {detail}; no model was made",
        advice="load again when nothing writes to it",
    )


# --- one tensor ----------------------------------------------------------------------------------------------------


def _read(descriptor: int, read: Read, tensors: Mapping[str, torch.Tensor]) -> None:
    for part in read.parts:
        target = tensors[part.name]
        block = whole_block(part, read.info.shape, target.shape)
        if is_run(block) and read.info.dtype == dtype_name(target.dtype) and target.device.type == "cpu":
            _read_run(descriptor, read.info, block, target)
        else:
            _read_staged(descriptor, read.info, block, target)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_run(descriptor: int, info: TensorInfo, block: Block, target: torch.Tensor) -> None:
    size = ITEM_BYTES[info.dtype]
    place = raw_bytes(target)[block.offset * size : (block.offset + block.length) * size]
    read_into(descriptor, place, info.offset + block.start * size, info)


def _read_staged(descriptor: int, info: TensorInfo, block: Block, target: torch.Tensor) -> None:
    size = ITEM_BYTES[info.dtype]
    staging = torch.empty(min(block.length, max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
    buffer = raw_bytes(staging)
    for piece in cut(block, staging.numel()):
        read_into(descriptor, buffer[: piece.length * size], info.offset + piece.start * size, info)
        found = staging.as_strided(piece.shape, piece.stored_strides)
        target.as_strided(piece.shape, piece.strides, piece.offset).copy_(found)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def read_into(descriptor: int, place: memoryview, offset: int, info: TensorInfo) -> None:
    """Fills `place` from the file; the kernel may hand it over in several pieces."""
    done = 0
    while done < len(place):
        count = os.preadv(descriptor, [place[done : done + MAX_IO_BYTES]], offset + done)
        if count == 0:
            raise _changed(Path(info.file), f"it ends at byte {offset + done}, inside {info.name}")
        done += count


# --- looking at what was read ----------------------------------------------------------------------------------------


def _has_nan(read: Read, tensors: Mapping[str, torch.Tensor]) -> bool:
    blocks = ((tensors[part.name], whole_block(part, read.info.shape, tensors[part.name].shape)) for part in read.parts)
    views = (target.as_strided(block.shape, block.strides, block.offset) for target, block in blocks)
    return any(view.is_floating_point() and bool(view.isnan().any()) for view in views)


def _compare_doubles(plan: Plan, tensors: Mapping[str, torch.Tensor], advance: Callable[[int], None]) -> list[Fault]:
    """Tied weights that are stored twice must hold the same values."""
    faults = []
    shards = {shard.path.name: shard for shard in plan.files.shards}
    for info, name in plan.doubles:
        with opened(shards[info.file]) as descriptor:
            same = _equals(descriptor, info, tensors[name])
        if not same:
            faults.append(Fault(info.name, "tied weights differ", f"{info.file}: not the values of {name}"))
        advance(info.nbytes)
    return faults


def _equals(descriptor: int, info: TensorInfo, tensor: torch.Tensor) -> bool:
    size = ITEM_BYTES[info.dtype]
    staging = torch.empty(min(tensor.numel(), max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
    for start in range(0, tensor.numel(), staging.numel()):
        held = tensor.reshape(-1)[start : start + staging.numel()]
        read_into(descriptor, raw_bytes(staging)[: held.numel() * size], info.offset + start * size, info)
        found = staging[: held.numel()].to(device=held.device, dtype=held.dtype)
        if not torch.allclose(found, held, rtol=0, atol=0, equal_nan=True):
            return False
    return True
