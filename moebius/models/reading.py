"""Reading a config.json: every field typed, ranged and accounted for, all faults raised at once.  No torch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moebius.checkpoint.files import shown, shown_name
from moebius.errors import ConfigError, Fault

MAX_SIZE = 2**31 - 1
MAX_DETAIL = 500  # characters
MISSING = object()

BOOKKEEPING_KEYS = """
    model_type architectures _name_or_path name_or_path transformers_version auto_map use_cache
    return_dict  output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    pruned_heads  chunk_size_feed_forward is_decoder tie_encoder_decoder cross_attention_hidden_size
    finetuning_task id2label label2id  tokenizer_class prefix sep_token_id decoder_start_token_id
    task_specific_params problem_type attn_implementation  _attn_implementation
    _attn_implementation_autoset experts_implementation _experts_implementation
"""

GENERATION_KEYS = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p  typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids  num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id  remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""

FLOAT32_MAX = 3.4028234e38
INERT_KEYS = frozenset(BOOKKEEPING_KEYS.split() + GENERATION_KEYS.split())
"""Fields that say nothing about the model in any family.  Code that `auto_map` names is never run."""


class ConfigReader:
    """Reads fields from one JSON object.

    A field that is missing or wrong is noted and a harmless stand-in returned, so that reading goes on; `finish` raises
    them all.  A field may have aliases: any spelling counts, two with different values are a contradiction.
    default: what an absent field means.  null: what null means, which is a fault where the caller does not say:
    transformers takes it now for false, now for another number than the default.
    """

    def __init__(self, raw: Mapping[str, Any], *, within: str = ""):
        self.raw = raw
        self.faults: list[Fault] = []
        self._within = within
        self._read: set[str] = set()

    def integer(
        self,
        *names: str,
        default: int | None = None,
        null: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_SIZE,
    ) -> int:
        """A whole number in [minimum, maximum]; absent is a fault without a `default`."""
        expected = f"a whole number from {minimum} to {maximum}"
        found = self._checked(names, expected, lambda value: _is_integer(value, minimum, maximum), default, null=null)
        return minimum if found is None else found

    def optional_integer(
        self, *names: str, absent: int | None = None, minimum: int = 0, maximum: int = MAX_SIZE
    ) -> int | None:
        """As `integer`, where null means None."""
        present = self._value(names)
        if present is MISSING:
            return absent
        return None if present is None else self.integer(*names, minimum=minimum, maximum=maximum)

    def integers(self, name: str, *, absent: tuple[int, ...] = (), below: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers in [0, below), or one alone; null means none."""
        if self._value((name,)) is MISSING:
            return absent
        maximum = MAX_SIZE if below is None else below - 1
        expected = f"whole numbers from 0 to {maximum}"
        value = self._checked((name,), expected, lambda found: _are_integers(found, maximum), [], null=[])
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    def positive(self, *names: str, default: float | None = None, null: float | None = None) -> float:
        """A finite number above zero."""
        expected = "a number above 0"
        found = self._checked(names, expected, lambda value: _is_number(value) and value > 0, default, null=null)
        return 1.0 if found is None else float(found)

    def non_negative(self, *names: str, default: float, null: float | None = None) -> float:
        """A finite number, zero or more."""
        expected = "a number, 0 or more"
        return float(self._checked(names, expected, lambda value: _is_number(value) and value >= 0, default, null=null))

    def optional_positive(self, *names: str) -> float | None:
        """As `positive`, where absent and null mean None."""
        return None if self._value(names) in (MISSING, None) else self.positive(*names)

    def share(self, *names: str, default: float) -> float:
        """A number above 0, up to 1."""
        expected = "a number above 0, up to 1"
        return float(self._checked(names, expected, lambda value: _is_number(value) and 0 < value <= 1, default))

    def boolean(self, *names: str, default: bool) -> bool:
        return bool(self._checked(names, "true or false", lambda value: isinstance(value, bool), default))

    def one_of(self, *names: str, supported: Iterable[str], default: str | None = None) -> str | None:
        """One of the supported strings; without a `default`, absent and null mean None."""
        choices, optional = tuple(supported), default is None
        expected = f"one of {', '.join(choices)}"
        return self._checked(names, expected, lambda value: value in choices, default, optional=optional)

    def kinds(self, name: str, *, supported: Iterable[str]) -> tuple[str, ...] | None:
        """A list of the supported strings; absent or null means None."""
        choices = tuple(supported)
        expected = f"a list, each one of {', '.join(choices)}"
        found = self._checked((name,), expected, lambda value: _are_kinds(value, choices), None, optional=True)
        return None if found is None else tuple(found)

    def must_be(self, name: str, supported: object, *, absent: object = MISSING) -> None:
        """Refuse every value but `supported`; an absent field counts as `absent`, which is `supported` unless said."""
        value = self._value((name,))
        value = (supported if absent is MISSING else absent) if value is MISSING else value
        if value != supported or isinstance(value, bool) != isinstance(supported, bool):
            self.fault(name, "unsupported", f"{shown(value)}; supported: {shown(supported)}")

    def section(self, name: str, *, optional: bool = True) -> "ConfigReader":
        """A reader of the object at `name`, empty where that is absent or null; `close` it."""
        value = self._checked((name,), "an object", lambda found: isinstance(found, Mapping), None, optional=optional)
        return ConfigReader(value or {}, within=f"{self._within}{name}.")

    def with_fields(self, fields: Mapping[str, Any]) -> "ConfigReader":
        """A reader of the same object with these fields put in, or in place of its own."""
        return ConfigReader({**self.raw, **fields}, within=self._within)

    def joined(self, *names: str, sections: Iterable[str]) -> "ConfigReader":
        """A reader of these fields and of all fields of these sections, which it knows by dotted names; `close` it.

        So a field that may stand in several places is one with several spellings.
        """
        self.ignore(*names)
        fields = {name: self.raw[name] for name in names if name in self.raw}
        for section in sections:
            fields |= {f"{section}.{name}": value for name, value in self.section(section).raw.items()}
        return ConfigReader(fields, within=self._within)

    def close(self, section: "ConfigReader") -> None:
        """Take over a section's faults, fields that it did not read among them.

        None where the section is missing or no object: that is one fault, and was noted.
        """
        if section._within.removesuffix(".") not in {fault.where for fault in self.faults}:
            self.faults += [*section.faults, *section.unread()]

    def ignore(self, *names: str) -> None:
        """These fields are known, and change nothing here."""
        self._read.update(names)

    def relate(self, name: str, fits: bool, detail: str, *others: str) -> None:
        """A relation between `name` and other fields; judged only where each of them was read without a fault."""
        faulty = {fault.where for fault in self.faults}
        if not fits and faulty.isdisjoint(self._within + field for field in (name, *others)):
            self.fault(name, "value", detail)

    def fault(self, name: str, what: str, detail: str) -> None:
        """Note a fault, once however often the field is read; a detail that repeats a long value is cut."""
        cut = detail if len(detail) <= MAX_DETAIL else f"{detail[: MAX_DETAIL - 3]}..."
        fault = Fault(shown_name(self._within + name), what, cut)
        if fault not in self.faults:
            self.faults.append(fault)

    def unread(self) -> list[Fault]:
        """A fault for each field that nothing read."""
        unread = [name for name in self.raw if name not in self._read and name not in INERT_KEYS]
        return [
            Fault(
                shown_name(self._within + name),
                "unknown field",
                f"{shown(self.raw[name])}; what it changes is not implemented",
            )
            for name in unread
        ]

    def finish(self, model_type: str) -> None:
        """Raise ConfigError if anything was wrong, fields that nothing read included."""
        faults = [*self.faults, *self.unread()]
        if faults:
            raise ConfigError(
                f"config.json of a {model_type} model: {len(faults)} fault{'s' * (len(faults) > 1)}",
                faults=faults,
                advice="correct these fields; what is marked unsupported or unknown cannot be loaded faithfully",
            )

    def _value(self, names: tuple[str, ...]) -> Any:
        """The value under any of these spellings, or MISSING; null is a value."""
        self._read.update(names)
        found = {name: self.raw[name] for name in names if name in self.raw}
        given = {name: value for name, value in found.items() if value is not None}
        values = list((given or found).values())
        if any(value != values[0] for value in values[1:]):
            spelled = ", ".join(f"{name} {shown(value)}" for name, value in given.items())
            self.fault(names[0], "contradiction", f"{spelled}; they mean the same field")
        return values[0] if values else MISSING

    def _checked(
        self,
        names: tuple[str, ...],
        expected: str,
        valid: Callable[[Any], bool],
        default: Any,
        *,
        null: Any = None,
        optional: bool = False,
    ) -> Any:
        """optional: absent and null both mean None; without it and a default, both are a missing field."""
        value = self._value(names)
        if value is None and (null is not None or optional):
            return null
        if value is MISSING or (value is None and default is None):
            if default is None and not optional:
                self.fault(names[0], "missing", f"expected {expected}")
            return default
        if not valid(value):
            spelled = next(name for name in names if self.raw.get(name, MISSING) is value)
            self.fault(spelled, "value", f"expected {expected}, found {shown(value)}")
            return default
        return value


def _is_integer(value: object, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _are_integers(value: object, maximum: int) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return all(_is_integer(item, 0, maximum) for item in items)


def _are_kinds(value: object, choices: tuple[str, ...]) -> bool:
    return isinstance(value, list | tuple) and all(item in choices for item in value)


def _is_number(value: object) -> bool:
    """Finite, and no larger than a float32 can be: what is computed from it must be finite too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
