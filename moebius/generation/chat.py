"""A conversation that keeps what the model has already read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moebius.errors import InputError, SaveError
from moebius.generation.cache import KeyValueCache
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import Streamer, generate, resolve
from moebius.generation.prompt import Prompt, new_token_limit
from moebius.layers.decoder import Decoder
from moebius.tokenizer import Tokenizer

DEFAULT_REPLY_TOKENS = 256


class Chat:
    """A conversation with a model.

    messages: dicts with role and content, the system prompt's first if there is one.
    generation_config: the model's own (`model.generation_config`); None takes the decoder's special ids alone, which
    may lack the end of a turn.  options: as for `generate`; a reply has up to 256 tokens unless they say otherwise.

    Each turn renders the whole conversation, compares its token ids with the cached ones and reads only what differs: a
    template that drops earlier reasoning merely shortens what is kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        generation_config: GenerationConfig | None,
        system_prompt: str | None = None,
        **options: Any,
    ):
        self._decoder, self._tokenizer = decoder, tokenizer
        config = resolve(decoder.config, generation_config, options)
        if config.max_new_tokens is None and config.max_length is None:
            config = config.updated(max_new_tokens=DEFAULT_REPLY_TOKENS)
        self._config = config
        self._cache: KeyValueCache | None = None
        self._cached_ids: list[int] = []
        self.reused_tokens = 0  # of the last turn's prompt, how many the cache already held
        self.reset(system_prompt)

    def reset(self, system_prompt: str | None = None) -> None:
        """Start anew, with this system prompt or none."""
        self.messages: list[dict[str, Any]] = []
        if system_prompt is not None:
            self.messages.append({"role": "system", "content": system_prompt})

    def send(self, text: str, streamer: Streamer | None = None, **options: Any) -> str:
        """Say something; the model's reply, streamed as it comes if there is a streamer.

        An error or an interrupt leaves the conversation as it was before.
        """
        config = self._config.updated(**options)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        new = self._continue(prompt, config, streamer)
        reply = self._text_of(new, config)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON."""
        try:
            Path(path).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise SaveError(f"{path}: the conversation could not be saved: {error}") from error

    def load(self, path: str | Path) -> None:
        """Go on from messages that `save` wrote. Raises InputError if the file is not such."""
        try:
            messages = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable conversation: {error}") from error
        self.messages = _checked_messages(messages, path)

    def _continue(self, prompt: list[int], config: GenerationConfig, streamer: Streamer | None) -> list[int]:
        input_ids = torch.tensor([prompt])
        cache = self._cache_for(prompt, new_token_limit(config, self._decoder.config, Prompt(input_ids, None)))
        self._cached_ids = prompt[: cache.length]  # true whatever happens below: a crop to it is always possible
        self.reused_tokens = cache.length
        output = generate(
            self._decoder,
            input_ids,
            torch.ones_like(input_ids),
            config,
            streamer=streamer,
            tokenizer=self._tokenizer,
            cache=cache,
        )
        ids = output[0].tolist()
        self._cached_ids = ids[: cache.length]
        return ids[len(prompt) :]

    def _cache_for(self, prompt: list[int], new_tokens: int) -> KeyValueCache:
        """The cache, holding the prompt's tokens as far as they are those it held, and large enough for the reply."""
        needed = len(prompt) + new_tokens
        if self._cache is None:
            weight = next(self._decoder.parameters())
            self._cache = KeyValueCache.for_decoder(
                self._decoder.config,
                batch=1,
                capacity=needed,
                dtype=weight.dtype,
                device=self._decoder.model.layer_devices,
            )
        kept = min(common_prefix(self._cached_ids, prompt), len(prompt) - 1)  # one token is read for its logits
        self._cache.crop(kept)
        if self._cache.capacity < needed:
            self._cache = self._cache.grown(max(needed, 2 * self._cache.capacity))
        return self._cache

    def _text_of(self, ids: list[int], config: GenerationConfig) -> str:
        ends = set(config.eos_token_id or ())
        text = self._tokenizer.decode([index for index in ids if index not in ends], skip_special_tokens=True)
        return cut_at_stop(text, config.stop_strings or ())


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids are the same."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((index for stop in stop_strings if (index := text.find(stop)) >= 0), default=len(text))]


def _checked_messages(messages: object, path: str | Path) -> list[dict[str, Any]]:
    if isinstance(messages, list) and all(isinstance(message, Mapping) and "role" in message for message in messages):
        return [dict(message) for message in messages]
    raise InputError(f"{path}: expected a JSON list of messages, each with a role")
