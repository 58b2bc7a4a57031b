"""The small files of a model folder: config.json and generation_config.json, read and written.  No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import parse_json, read_regular, reason
from moebius.errors import ConfigError
from moebius.generation.config import FIELDS, GENERATION_FILE, GenerationConfig

CONFIG_FILE = "config.json"
FIELD = "quantization_config"
ADAPTER_FILE = "adapter_config.json"  # peft's; transformers would load what it names instead of the folder's weights


def read_config(place: Path) -> Mapping[str, Any]:
    """The content of config.json, in the folder `place` or that file itself.

    Raises ConfigError if it is missing, not one JSON object, or beside an adapter.
    """
    folder = place.parent if place.is_file() else place
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(
            f"{folder / ADAPTER_FILE}: the folder holds an adapter, and adapters are not opened in this version",
            advice="merge it into its base model with peft (merge_and_unload), or take the base model's own folder",
        )
    path = place if place.is_file() else place / CONFIG_FILE
    try:
        raw = parse_json(read_regular(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: missing", advice="give a folder with config.json and *.safetensors") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable: {reason(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def described(
    raw: Mapping[str, Any],
    dtype: str,
    generation: GenerationConfig,
    source: Path | None,
    *,
    quantization_config: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files to be written beside weights of `dtype`: what was read, with dtype and settings brought up to date.

    source: the folder the model came from, whose generation_config.json may say more than a GenerationConfig holds.
    quantization_config: the one that takes the place of what was read.
    """
    besides = {name: value for name, value in _read_object(source, GENERATION_FILE).items() if name not in FIELDS}
    files = {
        CONFIG_FILE: _up_to_date(raw, dtype) | ({FIELD: quantization_config} if quantization_config else {}),
        GENERATION_FILE: {**besides, **generation.to_hf()},  # also if empty: an older one in its place would be obeyed
    }
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}


def _up_to_date(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json of weights of `dtype`; where a wrapper keeps the text model's fields in a section, there too."""
    spellings = [name for name in ("torch_dtype", "dtype") if name in raw] or ["dtype"]
    section = raw.get("text_config")
    inner = {"text_config": _up_to_date(section, dtype)} if isinstance(section, Mapping) else {}
    return {**raw, **inner, **dict.fromkeys(spellings, dtype)}


def _read_object(folder: Path | None, name: str) -> Mapping[str, Any]:
    path = folder and folder / name
    return parse_json(read_regular(path)) if path and path.is_file() else {}
