"""A set of weights replaced file by file, where folders cannot be exchanged.  No torch.

A mount point, a folder whose parent is not writable, some network file systems.  The new files are built in a folder
inside; shards then take names that the old set does not use, and renaming the index, or the only shard, is the one step
that makes the new set valid.  The old shards go after that.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from moebius.checkpoint.atomic import discard, flush
from moebius.checkpoint.checksums import SUMS_FILE
from moebius.checkpoint.files import INDEX_FILE, SINGLE_FILE
from moebius.checkpoint.reversing import SavePlan, renamed
from moebius.errors import Fault, SaveError

INSIDE = ".saving"
_CONFIG_FILE = "config.json"
_OLD_SUMS = f"old.{SUMS_FILE}"


def fitted(plan: SavePlan, folder: Path, extras: Mapping[str, bytes]) -> SavePlan:
    """The plan with names that the set in `folder` does not use.

    Raises SaveError if one renaming cannot replace that set: if it is one file and the new one several, or the other
    way round, or if config.json changes too.
    """
    old = next((name for name in (INDEX_FILE, SINGLE_FILE) if os.path.lexists(folder / name)), None)
    if old is None:
        return plan
    if faults := list(_obstacles(plan, old, folder, extras)):
        raise SaveError(
            f"{folder} was not written: its place cannot change from one set to another in one step",
            faults=faults,
            advice="save to a new folder",
        )
    return plan if old == SINGLE_FILE else renamed(plan, _unused(plan, set(os.listdir(folder))))


@contextmanager
def replacing_files(folder: Path, last: str, obsolete: Callable[[str], bool]) -> Iterator[Path]:
    """Gives a new, empty folder to fill, whose files move to `folder` when the block ends well.

    last: the file that makes the new set valid.  obsolete: whether a file name belongs to what is written anew.
    Raises OSError while the old set is whole; SaveError if the new one is in place, but not everything with it.
    """
    fresh = folder / INSIDE
    if fresh.exists():
        discard(fresh)
    os.mkdir(fresh)
    try:
        yield fresh
        names = set(os.listdir(fresh))
        _commit(fresh, folder, last)
        _finish(fresh, folder, lambda name: obsolete(name) and name not in names)
    finally:
        if fresh.exists():
            with suppress(OSError):
                discard(fresh)


def _obstacles(plan: SavePlan, old: str, folder: Path, extras: Mapping[str, bytes]) -> Iterator[Fault]:
    new = INDEX_FILE if plan.index else SINGLE_FILE
    if new != old:
        yield Fault(new, "another kind of set", f"{old} stands there")
    if _CONFIG_FILE in extras and _json(folder / _CONFIG_FILE) != json.loads(extras[_CONFIG_FILE]):
        yield Fault(_CONFIG_FILE, "differs", "it would not belong to the weights, for a moment")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _unused(plan: SavePlan, taken: set[str]) -> Mapping[str, str]:
    """A new name for every shard: its own without a number, or the first number with which all are free."""
    for number in count(1):
        ending = ".safetensors" if number == 1 else f".{number}.safetensors"
        names = {shard.name: re.sub(r"(\.\d+)?\.safetensors$", ending, shard.name) for shard in plan.shards}
        if len(set(names.values())) == len(names) and not taken & set(names.values()):
            return names
    raise AssertionError("count() does not end")


def _commit(fresh: Path, folder: Path, last: str) -> None:
    """Moves what nobody looks for yet, and then the file that names it."""
    early = [name for name in os.listdir(fresh) if name not in (last, SUMS_FILE)]
    early = [name for name in early if not os.path.lexists(folder / name)]
    try:
        for name in early:
            os.rename(fresh / name, folder / name)
        with suppress(FileNotFoundError):
            os.rename(folder / SUMS_FILE, fresh / _OLD_SUMS)  # without it, the old set opens as well
        flush(folder)
        os.rename(fresh / last, folder / last)
    except BaseException:
        if (fresh / last).exists():
            _take_back(early, fresh, folder)
        raise


def _take_back(early: Iterable[str], fresh: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):
        os.rename(fresh / _OLD_SUMS, folder / SUMS_FILE)
    for name in early:
        with suppress(FileNotFoundError):
            os.unlink(folder / name)


def _finish(fresh: Path, folder: Path, obsolete: Callable[[str], bool]) -> None:
    try:
        flush(folder)
        for name in set(os.listdir(fresh)) - {_OLD_SUMS}:
            os.rename(fresh / name, folder / name)
        for name in os.listdir(folder):
            if obsolete(name):
                os.unlink(folder / name)
        flush(folder)
    except OSError as error:
        raise SaveError(
            f"{folder} holds the new weights, but not all is done: {error.strerror}", advice="save again"
        ) from error
