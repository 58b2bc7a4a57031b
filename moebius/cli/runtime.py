"""Opening a model to run it: the steps that generate and chat share."""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from moebius.arguments import DEVICE_OF_A_RANK, DEVICES_ON_RANKS
from moebius.auto import AutoModelForCausalLM, CausalLM, open_checkpoint
from moebius.checkpoint.describe import size
from moebius.cli.console import Console
from moebius.cli.launched import several
from moebius.cli.memory import peak_memory
from moebius.cli.progress import loading_bar
from moebius.distributed.config import DistributedConfig
from moebius.errors import ArgumentError, Fault

if TYPE_CHECKING:
    from moebius.distributed.ranks import Ranks

Prepared = TypeVar("Prepared")
TOKEN_ID = re.compile("[0-9]{1,18}")  # what int64 can hold; whether the model has it, the model says


@dataclass(frozen=True)
class ModelChoice:
    """What the shared flags say about which model to run, and how.  ep_size: None leaves it to the number of ranks."""

    model: str
    revision: str
    dtype: str
    device: str
    experts: str
    offline: bool
    ep_size: int | None = None


def find(choice: ModelChoice) -> Path:
    """The folder that the model's files are in, checked as far as headers tell."""
    return open_checkpoint(
        choice.model, dtype=choice.dtype, revision=choice.revision, local_files_only=choice.offline
    ).folder


def load(name: str | Path, choice: ModelChoice, console: Console, **download: Any) -> CausalLM:
    """The model of this name or folder, on its device; under torchrun, on all ranks."""
    spread = several() or choice.ep_size is not None
    if spread and choice.device not in DEVICES_ON_RANKS:
        raise ArgumentError(f"--device {choice.device}: where ranks share the experts, expected {DEVICE_OF_A_RANK}")
    return AutoModelForCausalLM.from_pretrained(
        name,
        dtype=choice.dtype,
        device_map=choice.device,
        experts_implementation=choice.experts,
        distributed_config=DistributedConfig(enable_expert_parallel=True, ep_size=choice.ep_size) if spread else None,
        progress=loading_bar(console),
        **download,
    )


def opened(
    choice: ModelChoice, console: Console, prepare: "Callable[[Path, Ranks | None], Prepared]"
) -> tuple[CausalLM, Prepared]:
    """The model, and what `prepare` makes of its folder: before weights are read, unless ranks have to agree on it.

    Those come together while the model is opened; from then on, what one of them cannot do ends all.
    """
    if not several():
        folder = find(choice)
        prepared = prepare(folder, None)
        return load(folder, choice, console), prepared
    model = load(choice.model, choice, console, revision=choice.revision, local_files_only=choice.offline)
    assert model.source
    return model, prepare(model.source.folder, model.ranks)


def backend_name(decoder: CausalLM) -> str:
    """The backend that runs the routed experts: the one that was named, or what "auto" chooses here."""
    return decoder.experts_backend(decoder.device.type) or "none, the model is dense"


def sampling_options(**flags: Any) -> dict[str, Any]:
    """generate's arguments from the flags that were given; the checkpoint's own values hold for the rest.

    A temperature of 0 asks for the likeliest token; any other sampling flag asks for sampling.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if given.get("temperature") == 0:
        return {"do_sample": False}
    return given | ({"do_sample": True} if given else {})


def with_seed(options: dict[str, Any], decoder: CausalLM, seed: int | None, console: Console) -> dict[str, Any]:
    """options with the seed, drawn where none was given, and shown; as they are where nothing will be sampled."""
    if not options.get("do_sample", decoder.generation_config.do_sample):
        return options
    drawn = secrets.randbelow(2**31) if seed is None else seed
    console.note(f"seed {drawn}")
    return options | {"seed": drawn}


@dataclass
class Meter:
    """A streamer that passes on what it is given, and notes when tokens came. The first `put` is the prompt."""

    streamer: Any = None
    prompt_tokens: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    last_token: float = 0.0

    def put(self, value: Tensor) -> None:
        if not self.prompt_tokens:
            self.prompt_tokens = value.numel()
        else:
            self._count(value.numel())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def _count(self, tokens: int) -> None:
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        self.tokens += tokens

    def report(self, device_type: str) -> dict[str, Any]:
        decoding = self.last_token - self.first_token
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds_to_first_token": round(max(0.0, self.first_token - self.started), 4),
            "tokens_per_second": round((self.tokens - 1) / decoding, 2) if self.tokens > 1 else None,
            "peak_bytes": peak_memory(device_type),
        }


def summary(report: dict[str, Any], backend: str) -> str:
    speed = report["tokens_per_second"]
    return ", ".join(
        [
            f"{report['tokens']} tokens" + (f" at {speed:.1f} tok/s" if speed else ""),
            f"the first after {report['seconds_to_first_token']:.2f} s",
            f"peak memory {size(report['peak_bytes'])}",
            f"experts: {backend}",
        ]
    )


class IdStreamer:
    """Writes new token ids to stdout as they come; the prompt, which comes first, is left out."""

    def __init__(self) -> None:
        self._separator: str | None = None

    def put(self, value: Tensor) -> None:
        if self._separator is None:
            self._separator = ""
            return
        print(self._separator + " ".join(map(str, value.flatten().tolist())), end="", flush=True)
        self._separator = " "

    def end(self) -> None:
        print(flush=True)


def parse_ids(text: str) -> list[int]:
    """Token ids from text, parted by blanks or commas. ArgumentError: a word that is no number."""
    words: Sequence[str] = text.replace(",", " ").split()
    faults = [Fault("--ids", "not a token id", repr(word)) for word in words if not TOKEN_ID.fullmatch(word)]
    if faults or not words:
        raise ArgumentError("--ids takes token ids, as in --ids '1 2 3'", faults=faults)
    return [int(word) for word in words]
