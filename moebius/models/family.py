"""What a family is: how its config.json reads and writes, and its conversion rules.  No torch, no files on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig
from moebius.errors import ConfigError, Fault
from moebius.models.reading import ConfigReader


@dataclass(frozen=True)
class Family:
    """One model_type of the hub.

    architecture: the causal language model's name in `architectures`.  read, write: the fields of its config.json.
    rules: from the hub's keys to the decoder's names; keys that equal a name need none.
    """

    model_type: str
    architecture: str
    read: Callable[[ConfigReader], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rules: Callable[[DecoderConfig], tuple[Rule, ...]]

    def from_hf(self, raw: Mapping[str, Any]) -> DecoderConfig:
        """The content of a config.json -> DecoderConfig.  ConfigError: each field that is wrong or unknown."""
        reader = ConfigReader(raw)
        self._check_architecture(reader)
        _check_common(reader)
        config = self.read(reader)
        reader.finish(self.model_type)
        return config

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
        if named is not None and named != [self.architecture]:
            reader.fault("architectures", "unsupported", f"{named!r}; supported: {[self.architecture]!r}")


def _check_common(reader: ConfigReader) -> None:
    """What no family supports yet."""
    reader.must_be("quantization_config", None)
    reader.must_be("is_encoder_decoder", False)
    reader.must_be("add_cross_attention", False)


def _differences(config: DecoderConfig, read_back: DecoderConfig) -> list[Fault]:
    names = [field.name for field in fields(DecoderConfig)]
    differing = [name for name in names if getattr(config, name) != getattr(read_back, name)]
    return [
        Fault(name, "no words for", f"{getattr(config, name)!r}; the nearest reads {getattr(read_back, name)!r}")
        for name in differing
    ]
