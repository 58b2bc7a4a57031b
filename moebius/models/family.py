"""What a family is: how its config.json reads and writes, and its conversion rules.  No torch, no files on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.checkpoint.files import shown
from moebius.config import DecoderConfig
from moebius.errors import ConfigError, Fault
from moebius.models.reading import ConfigReader
from moebius.models.stored_forms import FIELD, read_stored_form
from moebius.quantization.forms import Form


@dataclass(frozen=True)
class Family:
    """One model_type of the hub.

    architecture: the causal language model's name in `architectures`; other_architectures: further names of it.
    read, write: the fields of its config.json.  rules: from the hub's keys to the decoder's names; keys that equal a
    name need none, and of several rules for a target the first is how the model is published.
    text_section: of a wrapper around a language model, the object that describes this; empty for a language model.
    """

    model_type: str
    architecture: str
    read: Callable[[ConfigReader], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rules: Callable[[DecoderConfig], tuple[Rule, ...]]
    other_architectures: tuple[str, ...] = ()
    text_section: str = ""

    def from_hf(self, raw: Mapping[str, Any]) -> DecoderConfig:
        """The content of a config.json -> DecoderConfig.  ConfigError: each field that is wrong or unknown.

        A quantization_config that `stored_form` can read says nothing of the decoder.
        """
        reader = ConfigReader(raw)
        self._check_architecture(reader)
        self._read_form(reader)
        config = self.read(reader)
        reader.finish(self.model_type)
        return config

    def stored_form(self, raw: Mapping[str, Any]) -> Form | None:
        """The quantized form in which the files may hold weights, None for plain ones.

        raw: the content of a config.json.  ConfigError: a form that is not built in, by name.
        """
        reader = ConfigReader(raw)
        form = self._read_form(reader)
        reader.ignore(*raw)
        reader.finish(self.model_type)
        return form

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """DecoderConfig -> the content of a config.json, which reads back as the same.

        ConfigError: this family has no words for what the config says.
        """
        raw = {"architectures": [self.architecture], "model_type": self.model_type, **self.write(config)}
        read_back = self.from_hf(raw)
        if read_back != config:
            raise ConfigError(
                f"this DecoderConfig cannot be written as a {self.model_type} config.json",
                faults=_differences(config, read_back),
            )
        return raw

    def _check_architecture(self, reader: ConfigReader) -> None:
        named = reader.raw.get("architectures")
        supported = [[name] for name in (self.architecture, *self.other_architectures)]
        if named is not None and named not in supported:
            expected = " or ".join(map(repr, supported))
            reader.fault("architectures", "unsupported", f"{shown(named)}; supported: {expected}")

    def _read_form(self, reader: ConfigReader) -> Form | None:
        """A wrapper may describe its form beside the language model, within it, or both."""
        outer = read_stored_form(reader)
        if not self.text_section:
            return outer
        text = reader.section(self.text_section)
        inner = read_stored_form(text)
        text.ignore(*text.raw)
        reader.close(text)
        if outer and inner and outer != inner:
            reader.fault(FIELD, "contradiction", f"{outer}, but {inner} in {self.text_section}")
        return outer or inner


def _differences(config: DecoderConfig, read_back: DecoderConfig) -> list[Fault]:
    names = [field.name for field in fields(DecoderConfig)]
    differing = [name for name in names if getattr(config, name) != getattr(read_back, name)]
    return [
        Fault(name, "no words for", f"{getattr(config, name)!r}; the nearest reads {getattr(read_back, name)!r}")
        for name in differing
    ]
