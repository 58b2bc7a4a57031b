"""Writes a model's tensors in the hub's layout: the plan backwards.  Old set or new set, never a mixture."""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from moebius.checkpoint.atomic import beside, exchangeable, replaceable, replacing_folder
from moebius.checkpoint.checksums import SUMS_FILE, file_digest, sums
from moebius.checkpoint.direct import new_file, sized_file
from moebius.checkpoint.files import INDEX_FILE
from moebius.checkpoint.hub import local_path
from moebius.checkpoint.inplace import INSIDE, fitted, replacing_files
from moebius.checkpoint.loading import Progress, Silent
from moebius.checkpoint.locking import locked
from moebius.checkpoint.mapping import mappable
from moebius.checkpoint.owning import WHOLE, fits, shape_within
from moebius.checkpoint.planning import Plan
from moebius.checkpoint.pool import default_readers
from moebius.checkpoint.reading import Shards, dtype_name
from moebius.checkpoint.reversing import SavePlan, as_loaded, renamed
from moebius.checkpoint.sharing import agreed, payload, written_by
from moebius.checkpoint.team import Alone, Team
from moebius.checkpoint.writing import fill_shards, write_shards
from moebius.errors import Fault, RankError, SaveError

PATIENCE_SECONDS = 60.0
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?(\.\d+)?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")


def save(
    plan: Plan | SavePlan,
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    checksums: bool = False,
    team: Team | None = None,
    boxes: Mapping[str, range] = WHOLE,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Writes `tensors` ({target name: tensor}) to the folder `path`.

    plan: the one they were loaded by, or a SavePlan.  extra_files: written beside the weights ({name: content}).
    checksums: write SHA256SUMS of the shards too (see checksums.py); without, one that stood there goes.
    Where the file system cannot exchange folders, a set that stands there is replaced by one of the same kind, its
    shards under other names (see inplace.py).
    team: the processes that write one set together.  Each calls this, with the plan of the whole model, its own
    tensors, and in `boxes` the rows (axis 0) that it has of those that it does not hold whole.  Each byte is written by
    one that holds it, to a file system that all share; what is left to do rank 0 does.  patience: seconds to wait for
    all to come.
    Raises SaveError if the disk is full, a file cannot be written, another save to `path` is under way, the tensors are
    not, by name and shape, those of the plan, or the processes do not agree; on all of them the same: then `path` holds
    what it held before.  RankError: a process went away; `path` holds the old set or the new one.
    """
    folder, team, extras = local_path(path).resolve(), team or Alone(), dict(extra_files or {})
    _meet(team, folder, patience)
    with _step(team, folder):
        todo = _todo(plan, tensors, boxes, folder)
    offers = agreed(todo, boxes, folder, team, checksums=bool(checksums))
    with Shards(plan.files.shards if isinstance(plan, Plan) else ()) as source, ExitStack() as held:
        site = _site(held, todo, folder, extras, team)
        todo = _named(todo, site.names)
        share = written_by(todo, offers, team.rank) if team.size > 1 else todo
        shown = progress or Silent()
        shown.start(payload(share), f"saving {folder.name}")
        try:
            with _step(team, folder):
                digests = _write(site.folder, share, tensors, source, team, shown.advance, checksums)
        finally:
            shown.finish()
        if checksums and team.size > 1:
            digests = _digests(site, team, folder)
        with _step(team, folder):
            if team.rank == 0:
                _write_extras(site, todo, extras | ({SUMS_FILE: sums(digests)} if checksums else {}))
                held.close()  # here the new set takes its place


@contextmanager
def _step(team: Team, folder: Path) -> Iterator[None]:
    """What is done on every rank, or else ends with the same error on every rank."""
    with team.together(f"saving {folder}"):
        try:
            yield
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            raise SaveError(f"{folder} could not be saved: {what}; what stood there is unchanged") from error


# --- before anything is written -------------------------------------------------------------------------------------


def _meet(team: Team, folder: Path, patience: float) -> None:
    try:
        team.meet(f"saving {folder}", patience)
    except RankError as error:
        raise SaveError(
            f"{folder} was not written: {error.message}",
            advice="call save_pretrained on every rank: each writes what it holds",
        ) from error


def _todo(
    plan: Plan | SavePlan, tensors: Mapping[str, torch.Tensor], boxes: Mapping[str, range], folder: Path
) -> SavePlan:
    loaded = isinstance(plan, Plan)
    shapes = {name: target.shape for name, target in plan.targets.items()} if loaded else plan.shapes
    if faults := [*_misfits(shapes, boxes), *_differences(shapes, tensors, boxes)]:
        raise SaveError(
            f"{folder} was not written: the model is not the one that was {'loaded' if loaded else 'planned'}",
            faults=faults,
            advice="load it with its weights; save what was added or resized by itself (safetensors.torch.save_file)",
        )
    return as_loaded(plan, {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}) if loaded else plan


def _misfits(shapes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, range]) -> Iterator[Fault]:
    for name, box in boxes.items():
        if name in shapes and not fits(box, shapes[name]):
            yield Fault(name, "no run of its first axis", f"found {box}, of shape {list(shapes[name])}")


def _differences(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], boxes: Mapping[str, range]
) -> Iterator[Fault]:
    """What the plan backwards would drop, cut, or look for in vain.  shapes: of the plan's tensors, whole."""
    for name in sorted(tensors.keys() | shapes.keys()):
        tensor = tensors.get(name)
        if tensor is None:
            yield Fault(name, "missing", "the plan has it, and it is not there to be saved")
        elif name not in shapes:
            yield Fault(name, "unexpected", "the files have no place for it")
        elif (shape := shape_within(shapes[name], boxes.get(name))) != tuple(tensor.shape):
            yield Fault(name, "shape", f"expected {list(shape)}, found {list(tensor.shape)}")
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


# --- where the new set is built ---------------------------------------------------------------------------------------


class _Site(NamedTuple):
    """folder: where the new set is built.  names: of its shards.  sign: of a file that only this folder has."""

    folder: Path
    names: tuple[str, ...]
    sign: str


def _site(held: ExitStack, todo: SavePlan, folder: Path, extras: Mapping[str, bytes], team: Team) -> _Site:
    """Made by rank 0, which holds the folder's lock until `held` is closed, and seen by all."""
    site = _Site(folder, (), "")
    with _step(team, folder):
        if team.rank == 0:
            site = _made(held, todo, folder, extras, shared=team.size > 1)
    site = team.told(site, f"saving {folder}")
    with _step(team, folder):
        if team.size > 1 and not (site.folder / site.sign).exists():
            raise SaveError(
                f"{site.folder}, made by rank 0, is not there for rank {team.rank}: they share no file system there",
                advice="save to a folder that all hosts see",
            )
    return site


def _made(held: ExitStack, todo: SavePlan, folder: Path, extras: Mapping[str, bytes], *, shared: bool) -> _Site:
    """shared: its files are there, of their length, for others to fill."""
    held.enter_context(_lock(folder))
    todo, way = _way(todo, folder, extras)
    fresh, sign = held.enter_context(way), f".{secrets.token_hex(8)}"
    _check_space(fresh, todo.nbytes)
    for shard in todo.shards if shared else ():
        sized_file(fresh / shard.name, shard.header, shard.nbytes)
    if shared:
        sized_file(fresh / sign, b"", 0)
    return _Site(fresh, tuple(shard.name for shard in todo.shards), sign)


def _named(plan: SavePlan, names: Sequence[str]) -> SavePlan:
    """As it is, or its shards under other names."""
    own = [shard.name for shard in plan.shards]
    return plan if own == list(names) else renamed(plan, dict(zip(own, names, strict=True)))


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    share: SavePlan,
    tensors: Mapping[str, torch.Tensor],
    source: Shards,
    team: Team,
    advance: Callable[[int], None],
    checksums: bool,
) -> dict[str, str]:
    """What is this process's to write; the digests of files that it wrote alone."""
    threads = default_readers()
    if team.size == 1:
        return write_shards(folder, share, tensors, source, threads=threads, advance=advance, checksums=checksums)
    fill_shards(folder, share, tensors, source, threads=threads, advance=advance)
    return {}


def _digests(site: _Site, team: Team, folder: Path) -> dict[str, str]:
    """Of the finished files, some of which each rank reads."""
    with _step(team, folder):
        mine = {name: file_digest(site.folder / name) for name in site.names[team.rank :: team.size]}
    found = team.gathered(mine, f"saving {folder}")
    return {name: digest for digests in found for name, digest in digests.items()}


def _write_extras(site: _Site, todo: SavePlan, extras: dict[str, bytes]) -> None:
    """The index and what stands beside the weights; the sign goes."""
    (site.folder / site.sign).unlink(missing_ok=True)
    for name, content in (extras | ({INDEX_FILE: todo.index} if todo.index else {})).items():
        _write_file(site.folder / name, content)


def _write_file(path: Path, content: bytes) -> None:
    with new_file(path, len(content)) as file:
        file.write(memoryview(content))
