"""The front door of tokenizers: a folder or a hub id, without torch."""

import os
from typing import Any

from moebius import tokenizer
from moebius.checkpoint import hub


class AutoTokenizer:
    """The name that transformers programs use."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> tokenizer.Tokenizer:
        """The tokenizer of a model folder, or of a hub id, of which only the small files are fetched.

        options: revision, token, cache_dir, local_files_only, force_download; the rest goes to
        moebius.tokenizer.AutoTokenizer (padding_side="left", pad_token="<pad>", ...).
        Raises CheckpointError if there is no such folder or id, TokenizerError if its tokenizer is missing or broken.
        """
        download = {name: options.pop(name) for name in hub.OPTIONS if name in options}
        folder = hub.resolve(name_or_path, weights=False, **download)
        return tokenizer.AutoTokenizer.from_pretrained(folder, **options)
