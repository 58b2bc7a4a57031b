"""A folder that appears whole or not at all.  No torch.

The new set is built in a sibling folder, flushed to the disk, and takes the old one's place in one step (renameat2 with
RENAME_EXCHANGE, Linux; elsewhere two renames).  A crash leaves the old set; what was not finished lies beside it
under a name beginning with a dot.
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moebius.errors import SaveError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing_folder(path: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Gives a new, empty folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    replaced: whether a file name of the old folder belongs to what is written anew.  Everything else that stood in the
    old folder is kept.  Raises SaveError if the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise SaveError(f"{path} is not a folder; nothing was written")
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".saving", dir=path.parent))
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror}; nothing was written") from error
    try:
        yield fresh
        _commit(fresh, path, replaced)
    except OSError as error:
        raise SaveError(f"{path} could not be saved: {error.strerror}; what stood there is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _commit(fresh: Path, path: Path, replaced: Callable[[str], bool]) -> None:
    """Puts `fresh` in the place of `path`; after an exchange, `fresh` is the old folder."""
    os.chmod(fresh, _folder_mode(path))
    old = [entry for entry in os.scandir(path) if not replaced(entry.name)] if path.exists() else []
    for entry in old:
        if not entry.is_dir(follow_symlinks=False) and not os.path.lexists(fresh / entry.name):
            os.link(entry.path, fresh / entry.name, follow_symlinks=False)
    _flush(fresh)
    _exchange(fresh, path) if path.exists() else os.rename(fresh, path)
    for entry in old:  # folders inside cannot be linked: they move over, from what is now the old set
        if entry.is_dir(follow_symlinks=False):
            os.rename(fresh / entry.name, path / entry.name)
    _flush(path.parent)


def _folder_mode(path: Path) -> int:
    if path.exists():
        return path.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders; where the system cannot do it in one step, in two, with the old one kept until the end."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    error = ctypes.get_errno() if renameat2 else errno.ENOSYS
    if error not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(error, os.strerror(error))
    aside = Path(f"{one}.old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
