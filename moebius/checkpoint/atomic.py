"""A folder that appears whole or not at all.  No torch.

The new set is built in a sibling folder, flushed to the disk, and takes the old one's place in one step (Linux:
renameat2 with RENAME_EXCHANGE).  What else stood in the old folder is linked into the new one beforehand.  What cannot
be linked, such as a folder, is first a symbolic link into the old set and then, in one step again, itself: it can be
found under its name at every moment.  A crash leaves the old set or the new one, and beside it the other under a name
beginning with a dot, which the next save clears away.
"""

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moebius.errors import SaveError

logger = logging.getLogger(__name__)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_MOUNTS = Path("/proc/self/mountinfo")


def beside(folder: Path) -> Path:
    """Where the new set of a folder is built."""
    return folder.parent / f".{folder.name}.saving"


def replaceable(folder: Path) -> bool:
    """May a folder beside it take its place, as far as one sees without trying?"""
    if not os.access(folder.parent, os.R_OK | os.W_OK | os.X_OK):
        return False
    return not folder.exists() or not _holds_mounts(folder)


def exchangeable(folder: Path) -> bool:
    """Can the file system exchange two folders?  Tried, in the place where the new set will be built."""
    fresh = beside(folder)
    settle(fresh, folder)
    os.mkdir(fresh)
    try:
        for name in ("one", "other"):
            os.close(os.open(fresh / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        exchange(fresh / "one", fresh / "other")
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return False
    finally:
        settle(fresh, folder)
    return True


@contextmanager
def replacing_folder(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Gives a new, empty folder to fill, which becomes `folder` when the block ends well and vanishes when it does not.

    replaced: whether a file name of the old folder belongs to what is written anew.  Everything else that stood in the
    old folder is kept.  Raises OSError if something cannot be written.
    """
    fresh = beside(folder)
    settle(fresh, folder)
    try:
        _make_like(folder, fresh)
        yield fresh
        _commit(fresh, folder, replaced)
    finally:
        settle(fresh, folder)


def settle(fresh: Path, folder: Path) -> None:
    """Clears `fresh` away, whichever set it holds; what `folder` finds there by a symbolic link moves over first."""
    try:
        if fresh.exists():
            if folder.is_dir():
                _bring_over(fresh, folder)
            discard(fresh)
    except OSError as error:
        logger.warning("%s could not be removed: %s", fresh, error.strerror)


def discard(folder: Path) -> None:
    """Removes a folder of files; one that holds folders is left as it is, they may be somebody's."""
    entries = list(os.scandir(folder))
    if folders := [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]:
        raise OSError(errno.ENOTEMPTY, f"it holds {', '.join(folders)}", str(folder))
    for entry in entries:
        os.unlink(entry.path)
    os.rmdir(folder)


def flush(folder: Path) -> None:
    """Names of the folder's files reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(one), None, str(other))


def _commit(fresh: Path, folder: Path, replaced: Callable[[str], bool]) -> None:
    """Puts `fresh` in the place of `folder`; after that, `fresh` is the old folder, if there was one."""
    if not folder.exists():
        flush(fresh)
        _put(fresh, folder, lambda: os.rename(fresh, folder), lambda: os.rename(folder, fresh))
        return
    _keep(folder, fresh, fresh.name, replaced)
    flush(fresh)
    _put(fresh, folder, lambda: _swap(fresh, folder, replaced), lambda: exchange(fresh, folder))


def _put(fresh: Path, folder: Path, forth: Callable[[], None], back: Callable[[], None]) -> None:
    """Goes forth, and back if that cannot be made to last."""
    new = os.stat(fresh).st_ino
    try:
        forth()
        flush(folder.parent)
    except BaseException:
        if folder.exists() and os.stat(folder).st_ino == new:
            _undo(back, folder)
        raise


def _undo(back: Callable[[], None], folder: Path) -> None:
    try:
        back()
    except OSError as error:
        raise SaveError(
            f"{folder} holds the new set, which may not survive a power failure: {error.strerror}", advice="save again"
        ) from error


def _swap(fresh: Path, folder: Path, replaced: Callable[[str], bool]) -> None:
    exchange(fresh, folder)
    _keep(fresh, folder, fresh.name, replaced)  # what came into the old folder in the meantime
    if _bring_over(fresh, folder):
        flush(folder)


def _keep(old: Path, new: Path, hidden: str, replaced: Callable[[str], bool]) -> None:
    """Whatever is not replaced in the old folder gets its name in the new one; hidden: the old one's last name."""
    for entry in list(os.scandir(old)):
        there = new / entry.name
        if replaced(entry.name) or os.path.lexists(there):
            continue
        try:
            os.link(entry.path, there, follow_symlinks=False)
        except OSError:  # a folder, or somebody else's file
            os.symlink(_into(hidden, entry.name), there)


def _bring_over(left: Path, folder: Path) -> bool:
    """Everything that stands in `left` and that `folder` only points to changes places with that pointer."""
    moved = False
    for entry in list(os.scandir(left)):
        there, pointer = folder / entry.name, _into(left.name, entry.name)
        if _points(there, pointer) and not _points(Path(entry.path), pointer):
            exchange(Path(entry.path), there)
        elif entry.is_dir(follow_symlinks=False) and not os.path.lexists(there):
            os.rename(entry.path, there)
        else:
            continue
        moved = True
    return moved


def _into(hidden: str, name: str) -> str:
    return f"../{hidden}/{name}"


def _points(path: Path, target: str) -> bool:
    return path.is_symlink() and os.readlink(path) == target


def _make_like(folder: Path, fresh: Path) -> None:
    """An empty folder with the mode and, as far as one may, the owner and group of the old one."""
    os.mkdir(fresh)
    if folder.exists():
        old, new = os.stat(folder), os.stat(fresh)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with suppress(PermissionError):
                os.chown(fresh, old.st_uid, old.st_gid)
        os.chmod(fresh, old.st_mode & 0o7777)


def _holds_mounts(folder: Path) -> bool:
    """Is the folder, or anything in it, the place of a mount?"""
    if os.stat(folder).st_dev != os.stat(folder.parent).st_dev:
        return True
    with suppress(OSError):  # not Linux: nothing more is known
        lines = _MOUNTS.read_text().splitlines()
        mounts = (Path(line.split()[4].encode().decode("unicode_escape")) for line in lines)
        return any(mount.is_relative_to(folder) for mount in mounts)
    return False
