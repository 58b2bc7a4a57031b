"""A folder's tokenizer files, read and checked: tokenizer.json and the small files beside it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import tokenizers

from moebius.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TEMPLATES_FOLDER = "additional_chat_templates"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    special_tokens: eos_token and the like, by name.  added_tokens: further tokens to know, in order of id.
    templates: chat templates by name, "default" the one that is used unless another is asked for.
    """

    folder: Path
    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    special_tokens: dict[str, str]
    added_tokens: list[tokenizers.AddedToken]
    templates: dict[str, str] = field(default_factory=dict)


def read_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of `folder`. Raises TokenizerError, one line that names the file."""
    backend = _read_backend(folder / TOKENIZER_FILE)
    config = _read_json(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:  # configs without it are of the days when the map had the last word
        config |= _read_json(folder / SPECIAL_TOKENS_FILE)
    return TokenizerFiles(
        folder=folder,
        backend=backend,
        config=config,
        special_tokens=_special_tokens(folder, config),
        added_tokens=_added_tokens(folder, config),
        templates=_templates(folder, config),
    )


def source_files(folder: Path) -> list[Path]:
    """The files of a folder that make its tokenizer, relative to it."""
    fixed = [TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE]
    extra = sorted(path.relative_to(folder) for path in (folder / TEMPLATES_FOLDER).glob("*.jinja"))
    return [Path(name) for name in fixed if (folder / name).is_file()] + extra


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(
            f"{path.parent}: no {TOKENIZER_FILE}",
            advice="convert it (transformers: AutoTokenizer.from_pretrained(a).save_pretrained(b)), or "
            "pass token ids made elsewhere",
        )
    text = _read_text(path)
    _parse_json(path, text)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.encode("")  # a post-processor's faults show only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the Rust library is no Exception
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{path}: the tokenizers library cannot read it: {reason}") from error
    return backend


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path, _read_text(path)) if path.is_file() else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Every `*_token` of the config that is a token, the usual seven first; others (image_token, ...) as found."""
    names = [*NAMED_TOKENS, *sorted(key for key in config if key.endswith("_token") and key not in NAMED_TOKENS)]
    found = {name: config[name] for name in names if config.get(name) is not None}
    flags = {name for name, value in found.items() if isinstance(value, bool)}  # add_bos_token and the like
    return {name: _content(folder, name, value) for name, value in found.items() if name not in flags}


def _is_text(value: object) -> TypeGuard[str]:
    """A text that is not empty and that UTF-8 can carry: JSON can spell lone surrogates, which it cannot."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= char <= "\udfff" for char in value)


def _content(folder: Path, name: str, value: object) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not _is_text(content):
        raise TokenizerError(f"{folder / CONFIG_FILE}: {name} should be a token's text, found {value!r}")
    return content


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """The added tokens beside tokenizer.json's own: by id from either file, then the extra special ones."""
    decoder = config.get("added_tokens_decoder") or {}
    legacy = {} if decoder else _read_json(folder / ADDED_TOKENS_FILE)
    try:
        by_id = {int(index): _added_token(token) for index, token in decoder.items()}
        by_id |= {int(index): tokenizers.AddedToken(text, special=False) for text, index in legacy.items()}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = extra.values() if isinstance(extra, dict) else extra
        specials = [
            tokenizers.AddedToken(_content(folder, "extra_special_tokens", token), special=True) for token in named
        ]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise TokenizerError(f"{folder / CONFIG_FILE}: its added tokens are not as expected: {error}") from error
    return [token for _, token in sorted(by_id.items(), key=lambda item: item[0])] + specials


def _added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token["content"], **{key: token[key] for key in ADDED_TOKEN_FIELDS if key in token})


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files before the config's entry; in the config a string, or a list of {"name", "template"}."""
    files = {path.stem: _read_text(path) for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        return {"default": _read_text(folder / TEMPLATE_FILE), **files}
    stored = _read_json(folder / TEMPLATE_JSON_FILE).get("chat_template") or config.get("chat_template")
    return {**_named_templates(folder, stored), **files}


def _named_templates(folder: Path, stored: object) -> dict[str, str]:
    match stored:
        case None:
            return {}
        case str():
            return {"default": stored}
        case list() if all(isinstance(entry, dict) for entry in stored):
            return _checked_templates(folder, [(entry.get("name"), entry.get("template")) for entry in stored])
        case dict():
            return _checked_templates(folder, list(stored.items()))
    raise TokenizerError(f"{folder / CONFIG_FILE}: chat_template should be a string or a list of named templates")


def _checked_templates(folder: Path, pairs: list[tuple[Any, Any]]) -> dict[str, str]:
    wrong = next((pair for pair in pairs if not (_is_text(pair[0]) and isinstance(pair[1], str))), None)
    if wrong is not None:
        raise TokenizerError(f"{folder / CONFIG_FILE}: chat_template {wrong[0]!r} should be a name and a template")
    return dict(pairs)
