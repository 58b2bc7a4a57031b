"""Names to local folders: a folder as it is, anything else is an id on the hub (huggingface_hub, lazily).  No torch."""

import json
import os
import re
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import INDEX_FILE, SINGLE_FILE
from moebius.errors import ArgumentError, CheckpointError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, templates; weights come by their names
NOT_CACHED = "not in the hub's cache, which local_files_only=True does not look beyond"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # as huggingface_hub takes them


def resolve(name_or_path: str | os.PathLike[str], *, weights: bool = True, **download: Any) -> Path:
    """The local folder of a checkpoint; from the hub, only the files that its index names are fetched.

    weights: fetch them too, not the small files alone.  download: any of OPTIONS.
    Raises CheckpointError if there is no such folder, no such id, or no way to reach it; ArgumentError for the
    revision of a folder.
    """
    text = os.fspath(name_or_path)
    path = local_path(text)
    if os.path.isdir(path):
        _refuse_revision(text, download.get("revision"))
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{text} is a file; expected a folder with config.json and *.safetensors")
    if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(
            f"{text}: no such folder", advice="give a folder with config.json and *.safetensors, or a hub id"
        )
    return _download(text, weights, download)


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path from the root on, so that it still holds after a chdir; `~` is the home folder."""
    return Path(os.path.abspath(os.path.expanduser(name)))


def _refuse_revision(folder: str, revision: str | None) -> None:
    if revision not in (None, "main"):
        raise ArgumentError(f"revision={revision!r}: a folder has no revisions, and {folder} is one here")


def _download(repo_id: str, weights: bool, options: dict[str, Any]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(SMALL_FILES), **options))
        if weights:
            options = options | {"revision": folder.name}  # the commit, so that all files are of one revision
            huggingface_hub.snapshot_download(repo_id, allow_patterns=_weight_files(folder), **options)
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        cached_only = options.get("local_files_only") and isinstance(error, LocalEntryNotFoundError)
        raise CheckpointError(
            f"{repo_id}: no such folder, and {NOT_CACHED if cached_only else _unreachable(error)}",
            advice=f"check the name; offline, fetch it first where there is a network: hf download {repo_id}",
        ) from error


def _unreachable(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"not to be had from the hub: {first}"


def _weight_files(folder: Path) -> list[str]:
    """The shards that the index names (what is wrong with it is said when the files are opened)."""
    try:
        names = set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [SINGLE_FILE]
    return sorted(name for name in names if isinstance(name, str))
