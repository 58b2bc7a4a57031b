"""`moebius chat`: a conversation at the terminal, or over a pipe, a line a turn."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebius.cli.console import open_console
from moebius.cli.options import (
    Device,
    DtypeOption,
    Experts,
    MaxTokens,
    MinP,
    Model,
    Offline,
    Quiet,
    Revision,
    Seed,
    Stop,
    SystemPrompt,
    Temperature,
    TopK,
    TopP,
    Verbose,
)
from moebius.errors import InputError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.cli.console import Console
    from moebius.generation.chat import Chat
    from moebius.generation.stream import TextStreamer

History = Annotated[Path | None, typer.Option("--history", help="Go on from this file if it is there; save to it.")]
COMMANDS = "/reset begins anew, /system TEXT too with a system prompt, /save FILE writes the turns, /exit ends"


def chat(
    model: Model,
    history: History = None,
    system_prompt: SystemPrompt = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    revision: Revision = "main",
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    experts: Experts = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model. Lines that begin with a slash are commands: /reset, /system, /save, /exit."""
    console = open_console(quiet, verbose)
    from moebius.cli.runtime import ModelChoice, find, load, sampling_options, with_seed
    from moebius.generation.chat import Chat
    from moebius.generation.stream import TextStreamer
    from moebius.tokenizer import AutoTokenizer

    choice = ModelChoice(model, revision, dtype, device, experts, offline)
    folder = find(choice)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise InputError(f"{model} has no chat template", advice="continue plain text: moebius generate MODEL -p TEXT")
    decoder = load(folder, choice, console)
    options = sampling_options(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    options = with_seed(options, decoder, seed, console) | {"max_new_tokens": max_tokens, "stop_strings": stop or None}
    conversation = Chat(
        decoder, tokenizer, system_prompt=system_prompt, generation_config=decoder.generation_config, **options
    )
    if history is not None:
        begin_history(history, conversation)
    console.note(COMMANDS)
    streamer = TextStreamer(tokenizer, skip_prompt=True, stop_strings=stop or (), skip_special_tokens=True)
    talk(conversation, streamer, console, history)


def begin_history(history: Path, conversation: "Chat") -> None:
    """Goes on from the file, or begins it: whether it can be written shows now, and not after the first reply."""
    if history.exists():
        conversation.load(history)
    else:
        conversation.save(history)


def talk(conversation: "Chat", streamer: "TextStreamer", console: "Console", history: Path | None) -> None:
    """Turn by turn, until /exit or the end of stdin; the history is saved after every turn."""
    while (line := next_line()) is not None:
        if line.startswith("/"):
            if not obey(line, conversation, console):
                return
        elif line.strip():
            answer(line, conversation, streamer, console)
            if history is not None:
                conversation.save(history)


def next_line() -> str | None:
    """A line from the terminal, with a prompt, or from a pipe; None at the end."""
    if is_terminal():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def is_terminal() -> bool:
    return sys.stdin.isatty()


def answer(line: str, conversation: "Chat", streamer: "TextStreamer", console: "Console") -> None:
    """Streams the reply. Ctrl-C ends the reply, not the conversation, which is then as before the line.

    Nor does a line that is refused, such as one too long, end it at a terminal; piped input ends with the error.
    """
    try:
        conversation.send(line, streamer=streamer)
    except KeyboardInterrupt:
        console.note("(stopped; this turn is forgotten)")
    except InputError as error:
        if not is_terminal():
            raise
        say_error(error)


def obey(line: str, conversation: "Chat", console: "Console") -> bool:
    """Does a slash command; False ends the conversation."""
    name, _, rest = line.partition(" ")
    commands: dict[str, Callable[[], None]] = {
        "/reset": conversation.reset,
        "/system": lambda: conversation.reset(rest or None),
        "/save": lambda: save(rest, conversation, console),
    }
    if name == "/exit":
        return False
    commands.get(name, lambda: console.note(f"{name} is not a command: {COMMANDS}"))()
    return True


def save(file: str, conversation: "Chat", console: "Console") -> None:
    if not file:
        console.note("/save needs a file: /save turns.json")
        return
    try:
        conversation.save(file)
    except SaveError as error:  # the turns are still here: another name may do
        say_error(error)
    else:
        console.note(f"saved to {file}")


def say_error(error: Exception) -> None:
    """Tells what went wrong where the conversation can go on, with --quiet too."""
    print(f"error: {error}", file=sys.stderr, flush=True)
