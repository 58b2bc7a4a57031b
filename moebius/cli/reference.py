"""docs/cli.md, written from the commands themselves: `python -m moebius.cli.reference > docs/cli.md`."""

import subprocess
import sys

from moebius.cli.__main__ import COMMANDS, EXIT_CODES

WIDTH = "100"

HEAD = """# The command line

The result of a command goes to stdout; notes, progress and logs go to stderr, and bars only to a terminal. `MODEL` is a
folder, or a name on the hub. In a flag's name `_` is as good as `-`.

Under `torchrun --nproc-per-node N --no-python moebius generate ...` the experts are spread over N processes. The first
one speaks, and an error of one ends all, with its message and code. `chat` is for one process alone; other commands the
first one runs, while the others wait.

This page is generated: `python -m moebius.cli.reference > docs/cli.md`.
"""


def reference() -> str:
    """The page: the head, each command's --help, the exit codes."""
    sections = [
        HEAD,
        _section("moebius", []),
        *(_section(f"moebius {name}", [name]) for name in COMMANDS),
        _exit_codes(),
    ]
    return "\n".join(sections)


def _section(title: str, command: list[str]) -> str:
    return f"## {title}\n\n```text\n{_help(command)}\n```\n"


def _help(command: list[str]) -> str:
    """What --help prints at a fixed width; asked of a process, for the width is read from the environment."""
    environment = {"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "NO_COLOR": "1"}
    arguments = [sys.executable, "-m", "moebius.cli", *command, "--help"]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in ended.stdout.strip().splitlines())


def _exit_codes() -> str:
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    return f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n"


if __name__ == "__main__":
    print(reference(), end="")
