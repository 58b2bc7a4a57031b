"""Writes a model's tensors in the hub's layout: the plan backwards.  Old set or new set, never a mixture."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from moebius.checkpoint.atomic import replacing_folder
from moebius.checkpoint.blocks import Block, cut, is_run, whole_block
from moebius.checkpoint.files import INDEX_FILE, ITEM_BYTES, CheckpointFiles, TensorInfo
from moebius.checkpoint.hub import local_path
from moebius.checkpoint.loading import Progress, Silent
from moebius.checkpoint.planning import STAGING_BYTES, Plan, Read
from moebius.checkpoint.reading import MAX_IO_BYTES, dtype_name, opened, raw_bytes, read_into, torch_dtype
from moebius.checkpoint.reversing import SavePlan, Shard, as_loaded, infos
from moebius.errors import Fault, SaveError

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")


def save(
    plan: Plan | SavePlan,
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `tensors` ({target name: tensor}) to the folder `path`.

    plan: the one they were loaded by, or a SavePlan.  extra_files: written beside the weights ({name: content}).
    Raises SaveError if the disk is full, a file cannot be written, or the tensors are not, by name and shape, those of
    the plan they were loaded by: then `path` holds what it held before.
    """
    folder = local_path(path).resolve()
    source = plan.files if isinstance(plan, Plan) else None
    todo = _as_loaded(plan, tensors, folder) if isinstance(plan, Plan) else plan
    extras = dict(extra_files or {}) | ({INDEX_FILE: todo.index} if todo.index else {})
    shown = progress or Silent()
    shown.start(todo.nbytes, f"saving {folder.name}")
    try:
        with replacing_folder(folder, lambda name: bool(_WEIGHTS.fullmatch(name)) or name in extras) as fresh:
            _check_space(fresh, todo.nbytes)
            for shard in todo.shards:
                _write_shard(fresh, shard, tensors, source, shown)
            for name, content in extras.items():
                _write_file(fresh / name, content)
    finally:
        shown.finish()


def _as_loaded(plan: Plan, tensors: Mapping[str, torch.Tensor], folder: Path) -> SavePlan:
    if faults := list(_differences(plan, tensors)):
        raise SaveError(
            f"{folder} was not written: the model is not the one that was loaded",
            faults=faults,
            advice="load it with its weights; save what was added or resized by itself (safetensors.torch.save_file)",
        )
    return as_loaded(plan, {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()})


def _differences(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Iterator[Fault]:
    """What the plan backwards would drop, cut, or look for in vain."""
    for name in sorted(plan.targets.keys() | tensors.keys()):
        target, tensor = plan.targets.get(name), tensors.get(name)
        if tensor is None:
            yield Fault(name, "missing", "it was loaded, and is not there to be saved")
        elif target is None:
            yield Fault(name, "unexpected", "the files it was loaded from have no place for it")
        elif target.shape != tuple(tensor.shape):
            yield Fault(name, "shape", f"loaded as {list(target.shape)}, now {list(tensor.shape)}")
        elif tensor.is_meta:
            yield Fault(name, "no data", "it is on the meta device")


def _check_space(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise SaveError(f"{folder.parent} has {free:,} bytes free, the save needs {needed:,}; nothing was changed")


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(
    folder: Path, shard: Shard, tensors: Mapping[str, torch.Tensor], source: CheckpointFiles | None, shown: Progress
) -> None:
    descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.truncate(descriptor, len(shard.header) + sum(info.nbytes for info in infos(shard)))
        _write_from(descriptor, memoryview(shard.header), 0)
        for read in shard.reads:
            _write(descriptor, read, tensors)
            shown.advance(read.info.nbytes)
        for info, stored in shard.carried:
            _carry(descriptor, info, stored, source)
            shown.advance(info.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, read: Read, tensors: Mapping[str, torch.Tensor]) -> None:
    for part in read.parts:
        target = tensors[part.name].detach()
        if not target.is_contiguous():
            target = target.contiguous()
        block = whole_block(part, read.info.shape, target.shape)
        if is_run(block) and target.device.type == "cpu":
            _write_run(descriptor, read.info, block, target)
        else:
            _write_staged(descriptor, read.info, block, target)


def _write_run(descriptor: int, info: TensorInfo, block: Block, target: torch.Tensor) -> None:
    size = ITEM_BYTES[info.dtype]
    held = raw_bytes(target)[block.offset * size : (block.offset + block.length) * size]
    _write_from(descriptor, held, info.offset + block.start * size)


def _write_staged(descriptor: int, info: TensorInfo, block: Block, target: torch.Tensor) -> None:
    """Goes through a staging buffer; a block with holes in the file keeps what other parts have written there."""
    size = ITEM_BYTES[info.dtype]
    staging = torch.empty(min(block.length, max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
    for piece in cut(block, staging.numel()):
        place, offset = raw_bytes(staging)[: piece.length * size], info.offset + piece.start * size
        if piece.length != math.prod(piece.shape):
            read_into(descriptor, place, offset, info.file)
        held = target.as_strided(piece.shape, piece.strides, piece.offset)
        staging.as_strided(piece.shape, piece.stored_strides).copy_(held)
        _write_from(descriptor, place, offset)


def _carry(descriptor: int, info: TensorInfo, stored: TensorInfo, source: CheckpointFiles | None) -> None:
    """Copies a tensor that the model does not use, file to file."""
    shard = next(shard for shard in (source.shards if source else ()) if shard.path.name == stored.file)
    with opened(shard) as origin:
        for start in range(0, info.nbytes, STAGING_BYTES):
            buffer = memoryview(bytearray(min(STAGING_BYTES, info.nbytes - start)))
            read_into(origin, buffer, stored.offset + start, stored.file)
            _write_from(descriptor, buffer, info.offset + start)


def _write_from(descriptor: int, held: memoryview, offset: int) -> None:
    done = 0
    while done < len(held):
        done += os.pwrite(descriptor, held[done : done + MAX_IO_BYTES], offset + done)
