"""`moebius generate`: a prompt in, text out, streamed."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.console import open_console, print_json
from moebius.cli.options import (
    Device,
    DtypeOption,
    EpSize,
    Experts,
    Json,
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

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from moebius.auto import CausalLM
    from moebius.cli.console import Console
    from moebius.cli.runtime import Meter
    from moebius.distributed.ranks import Ranks
    from moebius.generation.engine import Streamer
    from moebius.tokenizer import Tokenizer

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; - reads stdin.")]
Ids = Annotated[
    str | None, typer.Option("--ids", help="The prompt as token ids; ids are printed. No tokenizer needed.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as it is: no chat template.")]


def generate(
    model: Model,
    prompt: Prompt = None,
    ids: Ids = None,
    system_prompt: SystemPrompt = None,
    raw: Raw = False,
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
    ep_size: EpSize = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, or answer it. It is answered where the model has a chat template, unless --raw is given."""
    if (prompt is None) == (ids is None):
        raise typer.BadParameter("give the prompt as text (-p) or as token ids (--ids), one of the two")
    console = open_console(quiet, verbose)
    from moebius.cli.runtime import Meter, ModelChoice, opened, sampling_options, with_seed
    from moebius.on_ranks import together

    def form_for(folder: "Path", ranks: "Ranks | None") -> Form:
        if prompt is None:
            return ids_form(ids or "")
        text = read_stdin(ranks) if prompt == "-" else prompt
        with together(ranks, "reading the prompt"):
            return text_form(folder, TextPrompt(text, system_prompt, raw, tuple(stop or ())))

    decoder, form = opened(ModelChoice(model, revision, dtype, device, experts, offline, ep_size), console, form_for)
    options = sampling_options(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    options = with_seed(options, decoder, seed, console) | {"max_new_tokens": max_tokens}
    meter = Meter(None if json else form.streamer)
    new_ids = continuation(decoder, form, meter, options)
    report = {"ids": new_ids} | form.read(new_ids) | options | meter.report(decoder.device.type)
    _finish(report, decoder, console, json)


def read_stdin(ranks: "Ranks | None") -> str:
    """What stands there, which of several ranks only the first can read."""
    from moebius.on_ranks import together

    with together(ranks, "reading stdin"):
        text = sys.stdin.read() if ranks is None or ranks.first else ""
    return ranks.told(text, "reading stdin") if ranks else text


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as the flags gave it.  raw: no chat template.  stop: texts to end at."""

    text: str
    system: str | None
    raw: bool
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How a prompt goes in and its continuation comes out.

    input_ids: [1, T] int64.  streamer: writes new tokens to stdout.  stops: what generate is told of texts to end at.
    read: new ids -> what --json says of them beside the ids.
    """

    input_ids: "Tensor"
    streamer: "Streamer"
    stops: dict[str, Any]
    read: "Callable[[list[int]], dict[str, Any]]"


def ids_form(text: str) -> Form:
    """Token ids in, token ids out; no tokenizer is needed."""
    import torch

    from moebius.cli.runtime import IdStreamer, parse_ids

    return Form(torch.tensor([parse_ids(text)]), IdStreamer(), {}, lambda ids: {})


def text_form(folder: "Path", prompt: TextPrompt) -> Form:
    """Text in, text out, by the tokenizer in the model's folder."""
    from moebius.generation.stream import TextStreamer
    from moebius.tokenizer import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True, stop_strings=prompt.stop, skip_special_tokens=True)
    stops = {"stop_strings": list(prompt.stop), "tokenizer": tokenizer} if prompt.stop else {}
    return Form(
        prompt_ids(tokenizer, prompt),
        streamer,
        stops,
        lambda ids: {"text": tokenizer.decode(ids, skip_special_tokens=True)},
    )


def continuation(decoder: "CausalLM", form: Form, meter: "Meter", options: dict[str, Any]) -> list[int]:
    """The new token ids, which the meter is told of as they come."""
    output = decoder.generate(form.input_ids.to(decoder.device), streamer=meter, **options, **form.stops)
    return output[0, form.input_ids.shape[1] :].tolist()


def prompt_ids(tokenizer: "Tokenizer", prompt: TextPrompt) -> "Tensor":
    """[1, T] int64. A model with a chat template is asked in its own form, unless the prompt is raw."""
    from moebius.errors import ArgumentError

    templated = tokenizer.chat_template is not None and not prompt.raw
    if prompt.system is not None and not templated:
        raise ArgumentError("--system-prompt needs a chat template; here there is none, or --raw leaves it out")
    if not templated:
        return tokenizer(prompt.text, return_tensors="pt")["input_ids"]
    system = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
    messages = [*system, {"role": "user", "content": prompt.text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)


def _finish(report: dict[str, Any], decoder: "CausalLM", console: "Console", json: bool) -> None:
    from moebius.cli.runtime import backend_name, summary

    if json:
        print_json(report | {"experts": backend_name(decoder)})
    else:
        console.note(summary(report, backend_name(decoder)))
