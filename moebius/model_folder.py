"""The small files of a model folder: config.json and generation_config.json, read and written.  No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import parse_json, reason
from moebius.errors import ConfigError
from moebius.generation.config import GENERATION_FILE, GenerationConfig

CONFIG_FILE = "config.json"


def read_config(folder: Path) -> Mapping[str, Any]:
    """The content of config.json.  Raises ConfigError if it is missing, or not one JSON object."""
    path = folder / CONFIG_FILE
    try:
        raw = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: missing", advice="give a folder with config.json and *.safetensors") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: unreadable: {reason(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def described(
    raw: Mapping[str, Any], dtype: str, generation: GenerationConfig, source: Path | None
) -> dict[str, bytes]:
    """The files to be written beside weights of `dtype`: what was read, with dtype and settings brought up to date.

    source: the folder the model came from, whose generation_config.json may say more than a GenerationConfig holds.
    """
    spelled = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    files = {CONFIG_FILE: {**raw, spelled: dtype}}
    if settings := {**_read_object(source, GENERATION_FILE), **generation.to_hf()}:
        files[GENERATION_FILE] = settings
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}


def _read_object(folder: Path | None, name: str) -> Mapping[str, Any]:
    path = folder and folder / name
    return parse_json(path.read_bytes()) if path and path.is_file() else {}
