"""One saver a folder: a lock file that names who holds it.  No torch.

The lock is the kernel's (flock), which ends with its process; the file's content, "pid host", is for those who are
refused, and for file systems that do not tell one host of another's locks.
"""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moebius.errors import SaveError

logger = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(file: Path, folder: Path, *, local: bool) -> Iterator[None]:
    """Holds the lock `file` of a save to `folder`.

    local: the file system is this host's alone, so that a free lock has no owner, whatever host it names.
    Raises SaveError if another saver holds it.  What a dead one left is taken over, and logged.
    """
    descriptor = _taken(file, folder, local)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                os.unlink(file)  # still locked: whoever has it open finds that it is not this file any more
        finally:
            with suppress(OSError):
                os.close(descriptor)


def _taken(file: Path, folder: Path, local: bool) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if _lock(descriptor, file, folder) and _is(descriptor, file):
                _sign(descriptor, file, folder, local)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, file: Path, folder: Path) -> bool:
    """Takes the kernel's lock; where there is none, the owner's process must be gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(file, folder, _owner(descriptor)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        owner = _owner(descriptor)
        if owner[1] == platform.node() and _alive(owner[0]):
            raise _refusal(file, folder, owner) from error
    return True


def _sign(descriptor: int, file: Path, folder: Path, local: bool) -> None:
    pid, host = _owner(descriptor)
    if host not in ("", platform.node()) and not local:
        raise _refusal(file, folder, (pid, host))
    if host:
        logger.warning("%s: process %s on %s did not finish saving it; its lock is taken over", folder, pid, host)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {platform.node()}\n".encode(), 0)
    except BaseException:
        os.unlink(file)
        raise


def _owner(descriptor: int) -> tuple[str, str]:
    """(pid, host) as the lock names them; two empty texts if it names nobody yet."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _refusal(file: Path, folder: Path, owner: tuple[str, str]) -> SaveError:
    who = f"process {owner[0]} on {owner[1]}" if owner[1] else "another process"
    return SaveError(
        f"{folder} is being saved by {who}; nothing was written",
        advice=f"save to another folder, or wait; if that process is gone, remove {file}",
    )


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _is(descriptor: int, file: Path) -> bool:
    """Is what was opened still the file of that name?"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
