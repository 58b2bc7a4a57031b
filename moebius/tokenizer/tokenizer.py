"""The tokenizer: a `tokenizers.Tokenizer` with the special tokens, padding and chat templates of a model folder."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
import tokenizers.models

from moebius.errors import ArgumentError, SaveError, TokenizerError
from moebius.tokenizer import files as tokenizer_files
from moebius.tokenizer.cleanup import clean_up_spaces
from moebius.tokenizer.encoding import BatchEncoding, as_tensors, pad_rows
from moebius.tokenizer.special_tokens import SpecialToken, SpecialTokenId
from moebius.tokenizer.templates import TemplateRenderer, prepare_messages

Padding = bool | Literal["longest", "max_length", "do_not_pad"]

NO_LIMIT = 10**20  # a model_max_length above this means "not known"

UNSUPPORTED_TEMPLATE_ARGUMENTS = ("continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens")


class Tokenizer:
    """Text to ids and back.

    backend: any `tokenizers.Tokenizer`; it is used as it is, and special tokens it lacks are added to it.
    chat_template: one Jinja template, or several by name ("default" is the one used unless another is asked for).
    padding_side: where padding goes; "left", what generation needs.
    special_tokens: eos_token="...", bos_token, pad_token, unk_token, ... as keyword arguments.
    """

    bos_token, bos_token_id = SpecialToken(), SpecialTokenId()
    eos_token, eos_token_id = SpecialToken(), SpecialTokenId()
    pad_token, pad_token_id = SpecialToken(), SpecialTokenId()
    unk_token, unk_token_id = SpecialToken(), SpecialTokenId()

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        padding_side: Literal["left", "right"] = "left",
        truncation_side: Literal["left", "right"] = "right",
        model_max_length: int | None = None,
        clean_up_tokenization_spaces: bool = False,
        **special_tokens: str | None,
    ):
        _check_names(special_tokens)
        self.backend_tokenizer = backend
        self.padding_side: str = _checked_side("padding_side", padding_side)
        self.truncation_side: str = _checked_side("truncation_side", truncation_side)
        self.model_max_length = model_max_length
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.chat_templates = (
            {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        )
        self.special_tokens: dict[str, str] = {}
        self._source: Path | None = None
        self._renderer = TemplateRenderer()
        backend.no_padding()
        backend.no_truncation()
        for name, text in special_tokens.items():
            self.set_special_token(name, text)

    @classmethod
    def from_files(cls, files: tokenizer_files.TokenizerFiles, **overrides: Any) -> "Tokenizer":
        """A tokenizer of what `read_files` read; padding set in tokenizer.json gives defaults, as in transformers.

        overrides: arguments of Tokenizer that win over the files.
        """
        config, padding = files.config, files.backend.padding or {}
        files.backend.add_tokens(files.added_tokens)
        options = {
            "chat_template": files.templates,
            "padding_side": config.get("padding_side") or padding.get("direction") or "left",
            "truncation_side": config.get("truncation_side") or "right",
            "model_max_length": _length_limit(config.get("model_max_length")),
            "clean_up_tokenization_spaces": bool(config.get("clean_up_tokenization_spaces", False)),
            "pad_token": None if "pad_token" in config else padding.get("pad_token"),
            **files.special_tokens,
        }
        tokenizer = cls(files.backend, **{**options, **overrides})
        tokenizer._source = None if overrides else files.folder
        return tokenizer

    def set_special_token(self, name: str, text: str | None) -> None:
        """Name a special token (`eos_token`, ...), or take its name away with None."""
        self._source = None
        if text is None:
            self.special_tokens.pop(name, None)
            return
        self.special_tokens[name] = text
        known = {token.content for token in self.backend_tokenizer.get_added_tokens_decoder().values()}
        if text not in known:
            self.backend_tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True)])

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self._source = None
        self.chat_templates["default"] = template

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, without added tokens; `len(tokenizer)` counts those too."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @property
    def all_special_ids(self) -> list[int]:
        ids = (self.backend_tokenizer.token_to_id(text) for text in dict.fromkeys(self.special_tokens.values()))
        return [index for index in ids if index is not None]

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or ids of tokens; for one not in the vocabulary the unknown token's id, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(index)) for index in ids]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Padding = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"] | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> BatchEncoding:
        """Encode a text (lists of ints) or several (lists of lists); with return_tensors="pt", int64 tensors [B, T].

        padding: True or "longest", or "max_length".  truncation: cut to max_length (default model_max_length); a
        max_length alone, without padding, truncates too.
        Raises ArgumentError for arguments that contradict each other, or padding without a pad token.
        """
        texts = _checked_texts(text)
        if return_tensors not in (None, "pt"):
            raise ArgumentError(f'return_tensors={return_tensors!r} is not supported; expected "pt" or None')
        cut = truncation is True or (truncation is None and max_length is not None and padding is False)
        limit = max_length if max_length is not None else self.model_max_length
        encodings = self._encode_batch(texts, add_special_tokens, limit if cut else None)
        batch = BatchEncoding(
            input_ids=[encoding.ids for encoding in encodings], attention_mask=[e.attention_mask for e in encodings]
        )
        batch = self._padded(batch, padding, limit, padding_side)
        if return_tensors == "pt":
            return as_tensors(batch)
        return BatchEncoding({key: rows[0] for key, rows in batch.items()}) if isinstance(text, str) else batch

    def encode(self, text: str, **options: Any) -> Any:
        """The ids of a text; options as in `__call__`."""
        return self(text, **options).input_ids

    def _encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, limit: int | None
    ) -> list[tokenizers.Encoding]:
        backend = self.backend_tokenizer
        if limit is None:
            return self._encoded(texts, add_special_tokens)
        room = limit - (backend.num_special_tokens_to_add(False) if add_special_tokens else 0)
        if room < 0:
            raise ArgumentError(f"max_length={limit} leaves no room beside the special tokens")
        encodings = self._encoded(texts, add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(room, direction=self.truncation_side)
        return [backend.post_process(encoding, None, add_special_tokens) for encoding in encodings]

    def _encoded(self, texts: Sequence[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        try:
            return self.backend_tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the tokenizers library raises no narrower kind
            raise TokenizerError(f"the text cannot be encoded: {error}") from error

    def _padded(self, batch: BatchEncoding, padding: Padding, limit: int | None, side: str | None) -> BatchEncoding:
        match padding:
            case False | "do_not_pad":
                return batch
            case True | "longest":
                length = max((len(row) for row in batch.input_ids), default=0)
            case "max_length":
                length = limit or 0
            case _:
                raise ArgumentError(f'padding={padding!r}; expected True, False, "longest" or "max_length"')
        if self.pad_token_id is None:
            raise ArgumentError(
                "padding needs a pad token, and this tokenizer has none",
                advice="tokenizer.pad_token = tokenizer.eos_token",
            )
        side = _checked_side("padding_side", side or self.padding_side)
        return pad_rows(batch.input_ids, batch.attention_mask, length, self.pad_token_id, side)

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of ids (an int, a list, a tensor [T]); of rows of ids (lists, a tensor [B, T]), a list of texts."""
        rows = ids if isinstance(ids, int | list | tuple) else ids.tolist()
        if isinstance(rows, int):
            rows = [rows]
        if rows and not isinstance(rows[0], int):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]
        text = self.backend_tokenizer.decode(list(rows), skip_special_tokens=skip_special_tokens)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        # Clean-up is WordPiece's: a BPE text has spaces of its own, which it would take away (as transformers 5 holds).
        is_bpe = isinstance(self.backend_tokenizer.model, tokenizers.models.BPE)
        return clean_up_spaces(text) if clean and not is_bpe else text

    def batch_decode(
        self, rows: Iterable[Any], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: Padding = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_tensors: Literal["pt"] | None = None,
        return_dict: bool = True,
        **template_variables: Any,
    ) -> Any:
        """A conversation, or several, as the model saw them in training.

        messages: dicts with role and content.  tools: JSON schemas.  chat_template: a template, or the name of one.
        template_variables: whatever else the template knows (enable_thinking=False).
        Returns a BatchEncoding; its input_ids with return_dict=False; the text with tokenize=False.
        Raises TokenizerError when there is no template, or it fails, or it costs too much.
        """
        _refuse_unsupported(template_variables, tools)
        template = self._choose_template(chat_template, tools)
        several = bool(messages) and isinstance(messages[0], list | tuple)
        shared = {**self.special_tokens, **template_variables}
        shared |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        conversations = [prepare_messages(chat) for chat in (messages if several else [messages])]
        texts = [self._renderer.render(template, {**shared, "messages": chat}) for chat in conversations]
        if not tokenize:
            return texts if several else texts[0]
        encoding = self(
            texts if several else texts[0],
            padding=padding,
            truncation=bool(truncation),
            max_length=max_length,
            add_special_tokens=False,
            return_tensors=return_tensors,
        )
        return encoding if return_dict else encoding.input_ids

    def _choose_template(self, asked: str | None, tools: object) -> str:
        if asked is not None:
            return self.chat_templates.get(asked, asked)
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        if self.chat_templates:
            raise TokenizerError(f"no default chat template; name one: chat_template={' | '.join(self.chat_templates)}")
        raise TokenizerError(
            "this tokenizer has no chat template", advice="pass chat_template=..., or give the prompt as plain text"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer to `folder`: byte copies of the files it came from, unless it was changed since."""
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            if self._source is None:
                self._write(target)
            elif self._source.resolve() != target.resolve():
                _copy_files(self._source, target)
        except OSError as error:
            raise SaveError(f"{target}: the tokenizer could not be saved: {error}") from error

    def _write(self, target: Path) -> None:
        self.backend_tokenizer.save(str(target / tokenizer_files.TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length or NO_LIMIT,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            **self.special_tokens,
        }
        (target / tokenizer_files.CONFIG_FILE).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        for name, template in self.chat_templates.items():
            _write_template(target, name, template)


class AutoTokenizer:
    """The name that transformers programs use."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, use_fast: bool = True, trust_remote_code: bool = False, **overrides: Any
    ) -> Tokenizer:
        """The tokenizer of a model folder.

        overrides: arguments of Tokenizer that win over the files (padding_side="left", pad_token="<pad>").
        Raises TokenizerError when tokenizer.json is missing (naming the ways out) or a file is broken (naming it), and
        ArgumentError for use_fast=False and trust_remote_code=True: there is one kind, and no repository's code is run.
        """
        if trust_remote_code or not use_fast:
            raise ArgumentError(
                "a tokenizer is read from tokenizer.json alone: no use_fast=False, no trust_remote_code"
            )
        path = Path(folder)
        if not path.is_dir():
            raise TokenizerError(f"{path}: no such folder")
        return Tokenizer.from_files(tokenizer_files.read_files(path), **overrides)


def _check_names(special_tokens: Mapping[str, str | None]) -> None:
    for name in special_tokens:
        if not name.endswith("_token"):
            raise ArgumentError(f"Tokenizer has no option {name!r}; special tokens are named like eos_token")


def _checked_side(name: str, side: str) -> str:
    if side not in ("left", "right"):
        raise ArgumentError(f'{name} is "left" or "right", not {side!r}')
    return side


def _length_limit(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < NO_LIMIT else None


def _checked_texts(text: object) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if isinstance(texts, list | tuple) and all(isinstance(item, str) for item in texts):
        return list(texts)
    raise ArgumentError(f"expected a text or a list of texts, found {str(text)[:60]!r}, a {type(text).__name__}")


def _refuse_unsupported(options: Mapping[str, Any], tools: Sequence[Any] | None) -> None:
    for name in UNSUPPORTED_TEMPLATE_ARGUMENTS:
        if options.get(name):
            raise ArgumentError(f"apply_chat_template: {name} is not supported")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ArgumentError(
                "apply_chat_template: a tool is given by its JSON schema, a dict; functions are not read"
            )


def _copy_files(source: Path, target: Path) -> None:
    for name in tokenizer_files.source_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _write_template(target: Path, name: str, template: str) -> None:
    path = target / tokenizer_files.TEMPLATE_FILE
    if name != "default":
        path = target / tokenizer_files.TEMPLATES_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
    path.write_text(template, encoding="utf-8")
