"""What no case may do: take long, take much memory, change a file, reach out of the process, or leave something behind.

An audit hook cannot be taken away again, so this belongs into a process of its own.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 2.0
MEMORY_BYTES = 1 << 30  # of addresses beyond what the process has before the first case

REACHING_OUT = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
)
REACHING_OUT += ("pickle.", "marshal.load", "urllib.", "http.client.", "ftplib.", "smtplib.", "shutil.", "tempfile.")
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CHANGING += ("os.chown", "os.utime", "os.setxattr", "os.removexattr")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TooLongError(BaseException):
    """A case took more than its time; not an Exception, so that nothing takes it for one of its own."""


class Watch:
    """Notes what a case does that it must not, while it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and forbidden(event, arguments):
            self.seen.append(f"{event} {arguments[:2]!r}")


def forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
    match event:
        case "import":
            return str(arguments[0]).split(".")[0] != "moebius"
        case "open":
            return bool(arguments[2] & WRITING) or (
                isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
            )
        case "ctypes.dlopen":
            return arguments[0] is not None  # None is the process itself, whose mmap is called
        case "exec" | "compile":
            return not str(arguments[-1] if event == "compile" else "").startswith("<")
        case _:
            return event.startswith((*REACHING_OUT, *CHANGING))


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TooLongError in the main thread."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    running = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *running)  # a test's own limit begins anew


@contextmanager
def memory_limit(nbytes: int = MEMORY_BYTES) -> Iterator[None]:
    """This process gets no more than so many bytes of addresses beyond those that it has: MemoryError, or torch's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def standing() -> tuple[int, int, int]:
    """Threads, open files and child processes of this process: the same before and after a case."""
    return threading.active_count(), len(os.listdir("/proc/self/fd")), _children()


def _children() -> int:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 1
