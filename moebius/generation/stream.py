"""Text as it is generated, in transformers' streamer protocol: put(prompt), put(token) each step, end()."""

from collections.abc import Sequence
from queue import Queue
from typing import Any

from moebius.errors import ArgumentError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for the bytes of half a character


class TextDecoder:
    """Token by token to text; the pieces joined are the decoding of all the tokens.

    A piece is given once it ends in a whole character. Each is the difference between two decodings of the last few
    tokens, so decoders that join, strip or fall back to bytes do as they do on the whole text, at a constant cost.
    (A byte-fallback decoder takes back whole characters when later bytes are no UTF-8; what was given stays given.)
    """

    def __init__(self, tokenizer: Any, decode_options: dict[str, Any]):
        self._tokenizer, self._options = tokenizer, decode_options
        self._ids: list[int] = []
        self._window = 0  # the tokens before it are done with
        self._given = 0  # the tokens before it have been given as text
        self._length = 0  # characters given

    def push(self, token_id: int) -> str:
        """The text that this token completes, often all of its own, sometimes none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._window : self._given])
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self._window, self._given = self._given, len(self._ids)
        self._length += len(text) - len(before)
        return text[len(before) :]

    def finish(self) -> str:
        """What is left: characters that were never completed."""
        rest = self._decode(self._ids)[self._length :]
        self._ids, self._window, self._given, self._length = [], 0, 0, 0
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), **self._options)


class StopGate:
    """Lets text through up to a stop string, holding back a tail that may be the beginning of one."""

    def __init__(self, stop_strings: Sequence[str]):
        self._stop_strings = tuple(stop_strings)
        self.reset()

    def reset(self) -> None:
        self._held, self._closed = "", False

    def push(self, text: str) -> str:
        if self._closed:
            return ""
        self._held += text
        found = [index for stop in self._stop_strings if (index := self._held.find(stop)) >= 0]
        self._closed = bool(found)
        return self._release(min(found) if found else self._safe_length())

    def finish(self) -> str:
        return "" if self._closed else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _safe_length(self) -> int:
        """All but the longest tail that a stop string begins with."""
        starts = (
            len(self._held) - size
            for stop in self._stop_strings
            for size in range(1, len(stop))
            if self._held.endswith(stop[:size])
        )
        return min(starts, default=len(self._held))


class TextStreamer:
    """Prints the text of one row as it comes, and a newline at the end.

    skip_prompt: print only what is generated.  stop_strings: print nothing from the first of them on.
    decode_options: passed to tokenizer.decode (skip_special_tokens=True). Override `on_finalized_text` to send the text
    elsewhere. Any tokenizer will do that has `decode`, transformers' own too.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, stop_strings: Sequence[str] = (), **decode_options: Any
    ):
        self.skip_prompt = skip_prompt
        self._decoder = TextDecoder(tokenizer, decode_options)
        self._gate = StopGate((stop_strings,) if isinstance(stop_strings, str) else stop_strings)
        self._at_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt, a tensor [1, P], or a step's token, a tensor [1]. Raises ArgumentError for several rows."""
        if (value.dim() > 1 and len(value) > 1) or (value.dim() == 1 and len(value) > 1 and not self._at_prompt):
            raise ArgumentError(f"a text streamer follows one row, found {len(value)}")
        at_prompt, self._at_prompt = self._at_prompt, False
        if at_prompt and self.skip_prompt:
            return
        pieces = [self._decoder.push(token_id) for token_id in value.flatten().tolist()]
        text = "".join(pieces)
        # A stop string in the prompt stops nothing, so the prompt does not pass the gate.
        self._emit(text if at_prompt else self._gate.push(text))

    def end(self) -> None:
        """Give what was held back, then end the stream; the streamer can be used again."""
        rest = self._gate.push(self._decoder.finish()) + self._gate.finish()
        self._gate.reset()
        self._at_prompt = True
        self.on_finalized_text(rest, stream_end=True)

    def _emit(self, text: str) -> None:
        if text:
            self.on_finalized_text(text)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Iterates over the text, while generate runs in another thread; ends when generation does, also by an error.

    timeout: seconds to wait for a piece before queue.Empty is raised; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        stop_strings: Sequence[str] = (),
        **decode_options: Any,
    ):
        super().__init__(tokenizer, skip_prompt, stop_strings, **decode_options)
        self._timeout = timeout
        self._pieces: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self._timeout)
        if piece is None:
            raise StopIteration
        return piece
