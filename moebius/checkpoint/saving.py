"""Writes a model's tensors in the hub's layout: the plan backwards.  Old set or new set, never a mixture."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from moebius.checkpoint.atomic import beside, exchangeable, replaceable, replacing_folder
from moebius.checkpoint.checksums import SUMS_FILE, sums
from moebius.checkpoint.direct import new_file
from moebius.checkpoint.files import INDEX_FILE
from moebius.checkpoint.hub import local_path
from moebius.checkpoint.inplace import INSIDE, fitted, replacing_files
from moebius.checkpoint.loading import Progress, Silent
from moebius.checkpoint.locking import locked
from moebius.checkpoint.mapping import mappable
from moebius.checkpoint.planning import Plan
from moebius.checkpoint.pool import default_readers
from moebius.checkpoint.reading import Shards, dtype_name
from moebius.checkpoint.reversing import SavePlan, as_loaded
from moebius.checkpoint.writing import write_shards
from moebius.errors import Fault, SaveError

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?(\.\d+)?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")


def save(
    plan: Plan | SavePlan,
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    checksums: bool = False,
) -> None:
    """Writes `tensors` ({target name: tensor}) to the folder `path`.

    plan: the one they were loaded by, or a SavePlan.  extra_files: written beside the weights ({name: content}).
    checksums: write SHA256SUMS of the shards too (see checksums.py); without, one that stood there goes.
    Where the file system cannot exchange folders, a set that stands there is replaced by one of the same kind, its
    shards under other names (see inplace.py).
    Raises SaveError if the disk is full, a file cannot be written, another save to `path` is under way, or the tensors
    are not, by name and shape, those of the plan they were loaded by: then `path` holds what it held before.
    """
    folder = local_path(path).resolve()
    todo = _todo(plan, tensors, folder)
    extras, shown = dict(extra_files or {}), progress or Silent()
    shown.start(todo.nbytes, f"saving {folder.name}")
    try:
        with _lock(folder), Shards(plan.files.shards if isinstance(plan, Plan) else ()) as source:
            todo, way = _way(todo, folder, extras)
            with way as fresh:
                _check_space(fresh, todo.nbytes)
                digests = write_shards(
                    fresh,
                    todo,
                    tensors,
                    source,
                    threads=default_readers(),
                    advance=shown.advance,
                    checksums=checksums,
                )
                extras |= {INDEX_FILE: todo.index} if todo.index else {}
                extras |= {SUMS_FILE: sums(digests)} if checksums else {}
                for name, content in extras.items():
                    _write_file(fresh / name, content)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise SaveError(f"{folder} could not be saved: {what}; what stood there is unchanged") from error
    finally:
        shown.finish()


# --- before anything is written --------------------------------------------------------------------------------------


def _todo(plan: Plan | SavePlan, tensors: Mapping[str, torch.Tensor], folder: Path) -> SavePlan:
    shapes = {name: target.shape for name, target in plan.targets.items()} if isinstance(plan, Plan) else None
    if faults := list(_differences(shapes, tensors)):
        raise SaveError(
            f"{folder} was not written: the model is not the one that was loaded",
            faults=faults,
            advice="load it with its weights; save what was added or resized by itself (safetensors.torch.save_file)",
        )
    if isinstance(plan, SavePlan):
        return plan
    return as_loaded(plan, {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()})


def _differences(shapes: Mapping[str, tuple[int, ...]] | None, tensors: Mapping[str, torch.Tensor]) -> Iterator[Fault]:
    """What the plan backwards would drop, cut, or look for in vain.  shapes: of what was loaded, if anything was."""
    for name in sorted(tensors.keys() | (shapes or {}).keys()):
        tensor = tensors.get(name)
        if tensor is None:
            yield Fault(name, "missing", "it was loaded, and is not there to be saved")
        elif shapes is not None and name not in shapes:
            yield Fault(name, "unexpected", "the files it was loaded from have no place for it")
        elif shapes is not None and shapes[name] != tuple(tensor.shape):
            yield Fault(name, "shape", f"loaded as {list(shapes[name])}, now {list(tensor.shape)}")
        elif tensor.is_meta:
            yield Fault(name, "no data", "it is on the meta device")


def _lock(folder: Path) -> AbstractContextManager[None]:
    """Makes what is missing on the way to the folder, and keeps other savers out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SaveError(f"{folder} is not a folder; nothing was written")
    if replaceable(folder):
        return locked(Path(f"{beside(folder)}.lock"), folder, local=mappable(folder.parent))
    folder.mkdir(exist_ok=True)
    return locked(folder / f"{INSIDE}.lock", folder, local=mappable(folder))


def _way(todo: SavePlan, folder: Path, extras: Mapping[str, bytes]) -> tuple[SavePlan, AbstractContextManager[Path]]:
    """How the new set takes the old one's place, and the plan as it suits that."""
    obsolete = _obsolete(folder, extras)
    if replaceable(folder) and (not folder.exists() or exchangeable(folder)):
        return todo, replacing_folder(folder, obsolete)
    todo = fitted(todo, folder, extras)
    return todo, replacing_files(folder, INDEX_FILE if todo.index else todo.shards[0].name, obsolete)


def _obsolete(folder: Path, extras: Mapping[str, bytes]) -> Callable[[str], bool]:
    """Whether a file name is one of the old set's, or of those that are written anew."""
    try:
        old = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or none that anybody could read
        old = ()
    shards = {name for name in old if isinstance(name, str) and name.endswith(".safetensors")}
    return lambda name: name in {*shards, *extras, SUMS_FILE} or bool(_WEIGHTS.fullmatch(name))


def _check_space(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise SaveError(f"{folder.parent} has {free:,} bytes free, the save needs {needed:,}; nothing was changed")


def _write_file(path: Path, content: bytes) -> None:
    with new_file(path, len(content)) as file:
        file.write(memoryview(content))
