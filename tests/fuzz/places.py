"""Where a case's files lie while it is opened: one folder in memory, in which only what differs is written again."""

import os
import shutil
import tempfile
from pathlib import Path

from tests.fuzz.documents import Content, Files, Link, Special

MEMORY = Path("/dev/shm")


class Place:
    """A folder that holds one set of files at a time; a context that removes it."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="moebius-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
        self.folder = self._root / "checkpoint"
        self.folder.mkdir()
        self._held: Files = {}

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._root)

    def hold(self, files: Files) -> None:
        """Makes the folder hold these files and nothing else."""
        for name in [name for name, content in self._held.items() if files.get(name) != content]:
            _remove(self.folder / name)
            del self._held[name]
        for name, content in files.items():
            if name not in self._held:
                write(self.folder / name, content)
                self._held[name] = content

    def changes(self) -> list[str]:
        """Names of files that are not as they were put there."""
        there = {entry.name for entry in os.scandir(self.folder)}
        expected = {name for name in self._held if "/" not in name}
        return sorted(there ^ expected) + [name for name, content in self._held.items() if not self._is(name, content)]

    def _is(self, name: str, content: Content) -> bool:
        path = self.folder / name
        match content:
            case bytes():
                return path.is_file() and path.read_bytes() == content
            case Link():
                return os.readlink(path) == content.target
            case Special():
                return path.exists()


def write(path: Path, content: Content) -> None:
    match content:
        case bytes():
            path.write_bytes(content)
        case Link():
            path.symlink_to(content.target)
        case Special("folder"):
            path.mkdir()
        case Special():
            os.mkfifo(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def write_all(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(folder / name, content)
    return folder
