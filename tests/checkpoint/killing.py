"""Saves that are made to fail or to die: file operations counted, one of them made to fail, in this process or a child.

Children come from multiprocessing's fork server, which has torch loaded and no threads.
"""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from moebius import checkpoint
from moebius.checkpoint import atomic, checksums, locking, reversing, saving
from moebius.checkpoint.planning import Target

OPERATIONS = (
    *("open", "close", "pwrite", "ftruncate", "fsync", "mkdir", "rmdir", "link", "symlink", "rename", "unlink"),
    *("chmod", "scandir", "listdir", "statvfs", "readlink"),
)
CHILDREN = multiprocessing.get_context("forkserver")
Tell = Callable[[int, str], None]


@dataclass(frozen=True)
class Case:
    """A way to save.  exchanges: the file system can exchange two names.  shards: of a set.  fresh: into no folder."""

    exchanges: bool = True
    shards: int = 2
    fresh: bool = False


@cache
def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A set in which every tensor differs from that of any other seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, generator=generator) for name in "abcd"}


def save(folder: Path, seed: int, case: Case) -> None:
    """Set number `seed`, with checksums; where folders can be exchanged, config.json says the number too."""
    model = tensors(seed)
    targets = [Target(name, tuple(tensor.shape), "float32") for name, tensor in model.items()]
    plan = reversing.from_nothing([], targets, sum(tensor.nbytes for tensor in model.values()) // case.shards)
    config = f'{{"seed": {seed if case.exchanges else 0}}}'.encode()
    checkpoint.save(plan, model, folder, extra_files={"config.json": config}, checksums=True)


def make(folder: Path, case: Case) -> None:
    """Set number 0, beside files and a folder that are not part of it."""
    if case.fresh:
        return
    save_unflushed(folder, 0, case)
    (folder / "tokenizer.json").write_text("mine")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state").write_text("mine too")


def seed_in(folder: Path, case: Case, among: tuple[int, ...]) -> int | None:
    """Which set the folder holds, whole: by our own reader, by the safetensors library, with its config and sums."""
    if not folder.exists():
        return None
    files = checkpoint.open_files(folder)
    found = {key: tensor for shard in files.shards for key, tensor in load_file(shard.path).items()}
    (seed,) = [
        seed
        for seed in among
        if found.keys() == tensors(seed).keys() and all(torch.equal(found[key], tensors(seed)[key]) for key in found)
    ]
    assert checksums.check(files, threads=0) == []
    assert (folder / "config.json").read_text() == f'{{"seed": {seed if case.exchanges else 0}}}'
    if not case.fresh:
        assert (folder / "tokenizer.json").read_text() == "mine"
        assert (folder / "checkpoint-1" / "state").read_text() == "mine too"
    return seed


def assert_clean(folder: Path, case: Case) -> None:
    """Nothing is left of any earlier save, inside or beside."""
    if not folder.exists():
        assert not folder.parent.exists() or os.listdir(folder.parent) == []
        return
    assert os.listdir(folder.parent) == [folder.name]
    names = {shard.path.name for shard in checkpoint.open_files(folder).shards} | {"config.json", "SHA256SUMS"}
    names |= {"model.safetensors.index.json"} if case.shards > 1 else set()
    names |= set() if case.fresh else {"tokenizer.json", "checkpoint-1"}
    assert set(os.listdir(folder)) == names
    assert not any(path.is_symlink() for path in folder.iterdir())


@contextmanager
def watched(case: Case, tell: Tell, *, after: bool = False) -> Iterator[list[str]]:
    """Calls tell(n, name) ahead of the n-th file operation of a save, or after it; all in one thread.  Gives the names.

    Nothing is really flushed to the disk: a process that dies takes nothing from the system's memory with it.
    """
    seen: list[str] = []

    def wrapped(name: str, do: Callable) -> Callable:
        def call(*args, **options):
            seen.append(name)
            at = len(seen) - 1
            first = (after and name != "scandir") or name == "close"  # a listing would be lost; a file is closed anyway
            if not first:
                tell(at, name)
            result = do(*args, **options)
            if first:
                tell(at, name)
            return result

        return call

    with ExitStack() as stack:
        for name in OPERATIONS:
            do = (lambda descriptor: None) if name == "fsync" else getattr(os, name)
            stack.enter_context(mock.patch.object(os, name, wrapped(name, do)))
        exchange = atomic.exchange if case.exchanges else _cannot
        stack.enter_context(mock.patch.object(atomic, "exchange", wrapped("exchange", exchange)))
        stack.enter_context(mock.patch.object(locking.fcntl, "flock", wrapped("flock", locking.fcntl.flock)))
        stack.enter_context(mock.patch.object(saving, "default_readers", return_value=0))
        yield seen


def save_unflushed(folder: Path, seed: int, case: Case) -> None:
    with watched(case, lambda n, name: None):
        save(folder, seed, case)


def operations(folder: Path, seed: int, case: Case) -> list[str]:
    """The file operations of a save."""
    with watched(case, lambda n, name: None) as seen:
        save(folder, seed, case)
    return seen


# --- children --------------------------------------------------------------------------------------------------------


def start_server() -> None:
    """Before the first child, so that every child has this module loaded."""
    CHILDREN.set_forkserver_preload([__name__])


def die_at(at: int, folder: Path, seed: int, case: Case) -> None:
    """A child's save that ends, without any goodbye, ahead of its operation number `at`."""
    run(_dying, at, folder, seed, case)


def _dying(at: int, folder: Path, seed: int, case: Case) -> None:
    with watched(case, lambda n, name: os._exit(9) if n == at else None):
        save(folder, seed, case)


def run(target: Callable[..., None], *args: object) -> None:
    child = CHILDREN.Process(target=target, args=args)
    child.start()
    child.join(60)
    assert child.exitcode is not None


def kill_somewhere(folder: Path, seed: int, case: Case, seconds: float, choose: random.Random) -> bool:
    """A child's save, killed after a part of `seconds`; whether it was still alive."""
    ready, told = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=_telling, args=(told, folder, seed, case))
    child.start()
    told.close()
    ready.recv_bytes()
    time.sleep(choose.random() * seconds)
    child.kill()
    child.join(60)
    ready.close()
    return child.exitcode == -signal.SIGKILL


def _telling(told, folder: Path, seed: int, case: Case) -> None:
    torch.set_num_threads(1)
    told.send_bytes(b"now")
    with mock.patch.object(atomic, "exchange", atomic.exchange if case.exchanges else _cannot):
        save(folder, seed, case)


def _cannot(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
