"""What a command says beside its result: notes and logs, on stderr. stdout carries the result alone."""

import logging
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Console:
    """quiet: no notes.  bars: stderr is a terminal that may show progress bars."""

    quiet: bool
    bars: bool

    def note(self, text: str = "") -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def open_console(quiet: bool = False, verbose: bool = False) -> Console:
    """The console of one command; sends the library's log to stderr: warnings, with -v choices too, with -q errors."""
    logger = logging.getLogger("moebius")
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    return Console(quiet, bars=sys.stderr.isatty() and not quiet)


def print_result(text: str) -> None:
    print(text, flush=True)


def print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2), flush=True)
