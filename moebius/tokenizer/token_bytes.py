"""The bytes that one token adds to a text, even where they are only part of a character."""

import json
import re
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

ANCHOR = "abcdef"  # decoding a token after some other text keeps the space that it would lose at the start
FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token id -> its bytes in running text, remembered."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._kinds = _decoder_kinds(backend)
        self._alphabet = _byte_alphabet() if "ByteLevel" in self._kinds else {}
        self._anchor = backend.encode(ANCHOR, add_special_tokens=False).tokens
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            self._known[token_id] = self._bytes_of(self._backend.id_to_token(token_id))
        return self._known[token_id]

    def _bytes_of(self, token: str | None) -> bytes:
        if token is None:  # ids beyond the vocabulary pad many models' embeddings
            return b""
        if self._alphabet and all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        if "ByteFallback" in self._kinds and (match := FALLBACK_BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        before = self._decoded(self._anchor)
        return self._decoded([*self._anchor, token])[len(before) :].encode()

    def _decoded(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    decoder = backend.decoder
    if decoder is None:
        return set()
    return set(_types(json.loads(decoder.__getstate__())))


def _types(description: Any) -> list[str]:
    """Each "type" in a decoder's description, those in a sequence too."""
    inner = description.get("decoders", []) if isinstance(description, dict) else []
    return [description["type"], *(kind for part in inner for kind in _types(part))]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 onwards."""
    alphabet = sorted(ByteLevel.alphabet())
    printable = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(alphabet[len(printable) :], others, strict=True))
