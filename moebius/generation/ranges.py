"""What each field of GenerationConfig may be."""

from collections.abc import Callable, Mapping
from typing import Any

from moebius.errors import Fault


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _from_one(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _from_zero(value: Any) -> bool:
    return _is_int(value) and value >= 0


Rule = tuple[Callable[[Any], bool], str]

COUNT: Rule = (_from_one, "an integer >= 1")
INDEX: Rule = (_from_zero, "an integer >= 0")
SHARE: Rule = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")

RANGES: Mapping[str, Rule] = {
    "max_new_tokens": COUNT,
    "max_length": COUNT,
    "min_new_tokens": INDEX,
    "min_length": INDEX,
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "temperature": (lambda value: _is_number(value) and 0 <= value < 1e30, "a number >= 0"),
    "top_k": INDEX,
    "top_p": SHARE,
    "min_p": SHARE,
    "repetition_penalty": (lambda value: _is_number(value) and 0 < value < 1e30, "a number > 0"),
    "eos_token_id": (lambda ids: all(map(_from_zero, ids)), "token ids >= 0"),
    "pad_token_id": INDEX,
    "bos_token_id": INDEX,
    "stop_strings": (lambda texts: all(isinstance(text, str) and text for text in texts), "texts that are not empty"),
    "num_return_sequences": COUNT,
    "seed": (_is_int, "an integer"),
}


def range_faults(values: Mapping[str, Any]) -> list[Fault]:
    """What is out of range; None is always in it."""
    return [
        Fault(name, "refused", f"expected {expected}, found {values[name]!r}")
        for name, (accepts, expected) in RANGES.items()
        if values[name] is not None and not accepts(values[name])
    ]
