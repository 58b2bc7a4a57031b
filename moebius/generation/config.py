"""How to generate, as data: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import parse_json, reason
from moebius.errors import ArgumentError, ConfigError
from moebius.generation.options import OFF_VALUES, refusals
from moebius.generation.ranges import range_faults

GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"


def _as_tuple(value: Any) -> Any:
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, list) else (value,)


@dataclass(frozen=True)
class GenerationConfig:
    """The settings of one generation. None means not set: a lower layer decides (checkpoint, then DEFAULTS).

    max_new_tokens, or max_length counting the prompt: where to stop; max_new_tokens wins.
    min_new_tokens, min_length: no end of sequence before.
    do_sample: draw from the distribution; otherwise the likeliest token, the lowest id among equals.
    temperature: logits are divided by it; sampling needs one above 0.
    top_k: keep the k likeliest tokens (0: all).  top_p: keep the fewest likeliest with that much probability (1: all).
    min_p: keep tokens at least min_p times as likely as the likeliest.
    repetition_penalty > 0: divides positive and multiplies negative logits of tokens seen, the prompt's included
    (Keskar et al. 2019, CTRL, section 4.1).
    eos_token_id: a row ends after any of these.  pad_token_id: fills a row that has ended (default: the first eos).
    stop_strings: a row ends after the token that completes one.
    num_return_sequences: rows made of each prompt.
    seed: makes sampling repeatable, a row's tokens being the same in any batch; without it torch's generator governs.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: tuple[str, ...] | None = None
    num_return_sequences: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_id", _as_tuple(self.eos_token_id))
        object.__setattr__(self, "stop_strings", _as_tuple(self.stop_strings))
        if faults := range_faults(vars(self)):
            raise ArgumentError("generation options refused", faults=faults)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = GENERATION_FILE) -> "GenerationConfig":
        """What a generation_config.json says. Raises ConfigError naming every key that is unknown or unsupported."""
        faults = refusals(raw, FIELDS)
        values = {name: value for name, value in raw.items() if name in FIELDS}
        try:
            config = cls(**values)
        except ArgumentError as error:
            raise ConfigError(f"{where}: refused", faults=[*faults, *error.faults]) from error
        if faults:
            raise ConfigError(f"{where}: refused", faults=faults)
        return config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GenerationConfig":
        """The checkpoint's own settings: generation_config.json, or else what an older config.json says of them."""
        path = Path(folder) / GENERATION_FILE
        if path.is_file():
            return cls.from_hf(_read_json(path), str(path))
        path = Path(folder) / MODEL_FILE
        raw = _read_json(path) if path.is_file() else {}
        settings = {name: raw[name] for name in raw.keys() & {*FIELDS, *OFF_VALUES} if not name.startswith("output_")}
        return cls.from_hf(settings, str(path))

    def to_hf(self) -> dict[str, Any]:
        """As generation_config.json keeps it: what is set, a single end id as a number; the seed is no part of it."""
        values = {name: value for name, value in vars(self).items() if name != "seed"}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if self.eos_token_id is not None and len(self.eos_token_id) == 1:
            values["eos_token_id"] = self.eos_token_id[0]
        return {name: value for name, value in values.items() if value is not None}

    def over(self, base: "GenerationConfig") -> "GenerationConfig":
        """This one's settings where set, else `base`'s."""
        return replace(base, **{name: value for name, value in vars(self).items() if value is not None})

    def updated(self, **options: Any) -> "GenerationConfig":
        """With options of transformers' `generate`; None switches one off.

        Raises ArgumentError naming every option that is unknown (with the nearest known name) or not supported.
        """
        if faults := refusals(options, FIELDS):
            raise ArgumentError("generation options refused", faults=faults)
        values = {name: value for name, value in options.items() if name in FIELDS}
        return replace(self, **{name: getattr(OFF, name) if value is None else value for name, value in values.items()})


FIELDS = frozenset(spec.name for spec in fields(GenerationConfig))
DEFAULTS = GenerationConfig(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)
OFF = GenerationConfig(
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    eos_token_id=(),
    stop_strings=(),
    num_return_sequences=1,
)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable: {reason(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
    return raw
