"""The `moebius` command: its table of commands, and what it ends with."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import moebius
from moebius.cli import launched
from moebius.cli.bench import bench
from moebius.cli.chat import chat
from moebius.cli.convert import convert
from moebius.cli.demo import demo
from moebius.cli.env import env
from moebius.cli.generate import generate
from moebius.cli.inspect import inspect
from moebius.cli.plan import plan
from moebius.errors import MoebiusError

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": launched.by_first_rank(demo),
    "generate": generate,
    "chat": launched.alone(chat),
    "inspect": launched.by_first_rank(inspect),
    "plan": launched.by_first_rank(plan),
    "convert": launched.by_first_rank(convert),
    "env": launched.by_first_rank(env),
}
"""By name; what several processes do that torchrun starts is said here too."""

EXIT_CODES = {
    0: "done",
    1: "the work failed; a bug keeps its traceback",
    2: "usage: the nearest command or flag is named",
    3: "an input was refused",
    4: "it does not fit into memory; said before a weight is read",
    5: "another rank failed, or did not answer in time",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"moebius {moebius.__version__}")
        raise typer.Exit


def moebius_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and end.")
    ] = False,
) -> None:
    """Mixture-of-Experts language models in PyTorch: open, run and train them, with no expert lost."""


def make_app() -> typer.Typer:
    # Plain help is twice as quick as rich's, and a traceback must not print local values (they may be tokens).
    app = typer.Typer(
        name="moebius",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        callback=moebius_command,
    )
    for name, command in COMMANDS.items():
        app.command(name)(interruptible(command))
    app.add_typer(bench, name="bench")
    return app


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with numpy imported ahead of torch, whose C++ would import it and swallow a Ctrl-C meanwhile."""

    @wraps(command)
    def interruptible_command(**flags: Any) -> None:
        import numpy  # noqa: F401

        command(**flags)

    return interruptible_command


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    signal.signal(signal.SIGTERM, _terminated)
    if launched.rank() > 0:
        launched.hush()
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more; without this the interpreter would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if launched.rank() > 0:
        launched.end(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and gives its exit code; says what went wrong on stderr."""
    try:
        make_app()(args=with_hyphens(arguments), prog_name="moebius")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0
    except KeyboardInterrupt:  # before or after the command itself; during it, typer ends with the same code
        return 128 + signal.SIGINT
    except MoebiusError as error:
        return _say_error(error, arguments)
    except OSError as error:
        return _say_os_error(error, arguments)
    except Exception:  # noqa: BLE001 - the last stop before the user: a bug keeps its traceback, and says how to report it
        _say_bug(arguments)
        return 1
    return 0


def with_hyphens(arguments: Sequence[str]) -> list[str]:
    """--max_tokens=3 is --max-tokens=3: names lose their underscores, values and whatever follows `--` keep them."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [_hyphenated(word) for word in arguments[:end]] + list(arguments[end:])


def _hyphenated(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _say_error(error: MoebiusError, arguments: Sequence[str]) -> int:
    """On stderr with the first faults; where the result was asked for as JSON, all of them on stdout."""
    print(f"error: {error}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps(error.to_json(), indent=2))
    return error.exit_code


def _say_os_error(error: OSError, arguments: Sequence[str]) -> int:
    """A file that cannot be read or written is the machine's matter, and one line; without its name it may be a bug."""
    if error.filename is None:
        _say_bug(arguments)
    else:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def _say_bug(arguments: Sequence[str]) -> None:
    import traceback

    traceback.print_exc()
    command = next(iter(arguments), "")
    print(
        f"error: this is a bug in Moebius (moebius {command}); please report it with the lines above and what "
        "`moebius env --json` prints",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
