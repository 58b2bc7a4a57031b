"""One command in several processes, as torchrun starts them: the first speaks for all.  No torch.

A process learns from its environment (RANK, WORLD_SIZE) which one it is.
"""

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, cast

from moebius.errors import ArgumentError

PATIENCE_SECONDS = 3.0  # for rank 0, to say what went wrong
SIGNALLED = 128  # codes from here on: ended from outside
WAIT_SECONDS = 7 * 24 * 3600.0  # of ranks that have nothing to do, for the one that works


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if several() else 0


def several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def hush() -> None:
    """Of what Python writes here from now on, nothing is shown, unless `end` does so."""
    sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()  # noqa: SIM115  # until the process ends


def end(code: int) -> NoReturn:
    """A hushed process's end.  An error waits: rank 0, which knows it too, says it and ends, and with it torchrun ends
    all, as it does as soon as any has ended.  Where that does not happen, rank 0 does not know.
    """
    if code and code < SIGNALLED:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(PATIENCE_SECONDS)
        said = cast(io.StringIO, sys.stderr).getvalue()
        print(*(f"rank {rank()}: {line}" for line in said.splitlines()), sep="\n", file=sys.__stderr__, flush=True)
    sys.exit(code)


def by_first_rank(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which of several ranks the first one runs; the others wait, and end as it does."""

    @wraps(command)
    def command_of_first_rank(**flags: Any) -> None:
        if not several():
            command(**flags)
            return
        from moebius.distributed.config import DistributedConfig
        from moebius.distributed.ranks import join

        ranks = join(DistributedConfig(timeout_seconds=WAIT_SECONDS), 1, device_type="cpu")
        with ranks.together(f"moebius {command.__name__}"):
            if ranks.first:
                command(**flags)

    return command_of_first_rank


def alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which several ranks cannot run together."""

    @wraps(command)
    def command_alone(**flags: Any) -> None:
        if several():
            raise ArgumentError(
                f"moebius {command.__name__} is one process's, and here are {os.environ['WORLD_SIZE']}",
                advice="run it without torchrun; under torchrun there is moebius generate",
            )
        command(**flags)

    return command_alone
