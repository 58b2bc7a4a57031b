"""Prefill, then one token a step, on any Decoder.

B rows, P prompt tokens (padding included), N new tokens at most, T tokens a forward, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moebius.config import DecoderConfig
from moebius.errors import ArgumentError, CapacityError, MoebiusError
from moebius.generation.cache import KeyValueCache
from moebius.generation.config import DEFAULTS, GenerationConfig
from moebius.generation.prompt import Prompt, checked_ids, new_token_limit, read_prompt
from moebius.generation.sampling import draw, forbid, free_noise, penalize_repetition, seeded_noise, warp
from moebius.generation.stopping import Agree, Criterion, alone, stop_conditions
from moebius.layers.decoder import Decoder

PREFILL_CHUNK = 8192  # tokens of a row a forward: bounds a long prompt's memory

Processor = Callable[[Tensor, Tensor], Tensor]


class Streamer(Protocol):
    """transformers' protocol: the prompt [B, P], then each step's tokens [B], then end()."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@torch.no_grad()
def generate(
    decoder: Decoder,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    inputs: Tensor | None = None,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    logits_processor: Iterable[Processor] | None = None,
    stopping_criteria: Iterable[Callable[..., Any]] | None = None,
    cache: KeyValueCache | None = None,
    agree: Agree = alone,
    **options: Any,
) -> Tensor:
    """Continue each row of input_ids: int64 [B, P] -> int64 [B, P + up to N], on the device of input_ids.

    attention_mask: [B, P], 1 real, 0 padding, which must be on the left; without it, inferred as transformers does.
    generation_config: default, the decoder's special token ids.  options: its fields, which win; also every other
    argument of transformers' generate, as far as it asks for nothing that is missing here.
    inputs: another name for input_ids.  tokenizer: needed for stop_strings.
    logits_processor: called with (tokens [B, n], scores float32 [B, V]) each step; must give scores of that shape.
    cache: one that already holds the first cache.length tokens of the prompt.
    agree: asked of each step's tokens [B], and of what the caller's stopping criteria say, bool [B], where several
    processes run this same loop; what it gives is what counts.
    Raises ArgumentError (an option), InputError (the prompt), CapacityError (the cache), MoebiusError (NaN logits).
    """
    if input_ids is not None and inputs is not None:
        raise ArgumentError("inputs is another name for input_ids; give one of them")
    given = checked_ids(input_ids if inputs is None else inputs)
    device = next(decoder.parameters()).device
    config = resolve(decoder.config, generation_config, options)
    prompt = read_prompt(given, attention_mask, config, decoder.config.vocab_size, device)
    prompt = prompt.repeated(config.num_return_sequences or 1)
    limit = new_token_limit(config, decoder.config, prompt)
    conditions = stop_conditions(config, tokenizer, stopping_criteria or (), device, agree)
    if len(prompt.input_ids) > 1 and conditions:
        _check_filler(config, decoder.config.vocab_size)
    cache = _ready_cache(decoder, prompt, limit, cache)
    sampler = Sampler(config, prompt, decoder.config.vocab_size, list(logits_processor or ()), agree)
    feeder = Feeder(decoder, cache, prompt, limit)
    tokens = _run(feeder, sampler, conditions, prompt, limit, pad_id(config), streamer)
    return tokens.to(given.device)


def resolve(decoder: DecoderConfig, given: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """The settings in force: options before the given config (else the decoder's special ids) before DEFAULTS."""
    if given is None:
        given = GenerationConfig(
            eos_token_id=decoder.eos_token_id, pad_token_id=decoder.pad_token_id, bos_token_id=decoder.bos_token_id
        )
    config = given.over(DEFAULTS).updated(**options)
    if config.do_sample and config.temperature == 0:
        raise ArgumentError("sampling needs a temperature above 0", advice="do_sample=False takes the likeliest token")
    return config


def pad_id(config: GenerationConfig) -> int | None:
    """What fills a row that has ended."""
    if config.pad_token_id is None and config.eos_token_id:
        return config.eos_token_id[0]
    return config.pad_token_id


def _check_filler(config: GenerationConfig, vocab_size: int) -> None:
    filler = pad_id(config)
    if filler is None or filler >= vocab_size:
        found = "no token id fills them" if filler is None else f"pad_token_id {filler} is not one of {vocab_size} ids"
        raise ArgumentError(f"rows may end at different lengths, and {found}", advice="set pad_token_id")


def _ready_cache(decoder: Decoder, prompt: Prompt, limit: int, cache: KeyValueCache | None) -> KeyValueCache:
    rows, width = prompt.input_ids.shape
    needed = width + limit - 1  # the last token is never fed
    if cache is None:
        weight = next(decoder.parameters())
        return KeyValueCache.for_decoder(
            decoder.config, batch=rows, capacity=needed, dtype=weight.dtype, device=decoder.model.layer_devices
        )
    if cache.length >= width:
        raise ArgumentError(f"the cache holds {cache.length} tokens; a prompt of {width} leaves none to start from")
    if cache.capacity < needed:
        raise CapacityError(f"the cache holds {cache.capacity} tokens a row; prompt and new tokens need {needed}")
    return cache


class Feeder:
    """Gives the decoder its next tokens, with the mask and the positions that belong to them."""

    def __init__(self, decoder: Decoder, cache: KeyValueCache, prompt: Prompt, limit: int):
        self._decoder, self._cache = decoder, cache
        rows, width = prompt.input_ids.shape
        self._mask = None if prompt.attention_mask is None else _extended(prompt.attention_mask, limit)
        if self._mask is None:
            positions = torch.arange(width + limit, device=prompt.input_ids.device).expand(rows, -1)
        else:
            positions = (self._mask.cumsum(dim=1) - 1).clamp_min(0)
        self._positions = positions

    def prefill(self, input_ids: Tensor) -> Tensor:
        """The logits [B, V] after the prompt [B, P], of which the cache may already hold a part."""
        *chunks, last = input_ids[:, self._cache.length :].split(PREFILL_CHUNK, dim=1)
        for chunk in chunks:
            self.step(chunk)
        return self.step(last)

    def step(self, input_ids: Tensor) -> Tensor:
        """Feed tokens [B, T]; the logits [B, V] after the last of them, in float32."""
        start = self._cache.length
        end = start + input_ids.shape[1]
        output = self._decoder(
            input_ids,
            attention_mask=None if self._mask is None else self._mask[:, :end],
            position_ids=self._positions[:, start:end],
            cache=self._cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


class Sampler:
    """Chooses each row's next token from its logits."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Prompt,
        vocab_size: int,
        processors: Sequence[Processor],
        agree: Agree,
    ):
        self._config, self._processors, self._agree = config, processors, agree
        self._end_ids = [token_id for token_id in config.eos_token_id or () if token_id < vocab_size]
        self._min_tokens = _min_new_tokens(config, prompt.input_ids.shape[1])
        self._seen = _seen_tokens(prompt, vocab_size)
        self._lengths = prompt.lengths
        self._copies = config.num_return_sequences or 1

    def __call__(self, logits: Tensor, tokens: Tensor, step: int) -> Tensor:
        """The next tokens [B], from logits [B, V] after tokens [B, P + step]."""
        scores = self._processed(logits, tokens, step)
        if self._config.do_sample:
            scores = warp(scores, self._config)
        _check_numbers(scores, step)
        chosen = draw(scores, self._noise(scores, step)) if self._config.do_sample else scores.argmax(dim=1)
        chosen = self._agree(chosen)
        self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _processed(self, scores: Tensor, tokens: Tensor, step: int) -> Tensor:
        penalty = self._config.repetition_penalty
        if penalty is not None and penalty != 1:
            scores = penalize_repetition(scores, self._seen, penalty)
        if self._end_ids and step < self._min_tokens:
            scores = forbid(scores, self._end_ids)
        for processor in self._processors:
            scores = processor(tokens, scores)
        return scores

    def _noise(self, scores: Tensor, step: int) -> Tensor:
        seed = self._config.seed
        if seed is None:
            return free_noise(scores)
        seeds = [seed + row % self._copies for row in range(len(scores))]  # copies of one prompt should differ
        return seeded_noise(scores, seeds, [length + step for length in self._lengths])


def _run(
    feeder: Feeder,
    sampler: Sampler,
    conditions: Sequence[Criterion],
    prompt: Prompt,
    limit: int,
    pad: int | None,
    streamer: Streamer | None,
) -> Tensor:
    """The decode loop: tokens [B, P + N], cut where the last row ended."""
    rows, width = prompt.input_ids.shape
    tokens = torch.cat([prompt.input_ids, prompt.input_ids.new_zeros(rows, limit)], dim=1)
    going = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    end = width
    try:
        _tell(streamer, prompt.input_ids)
        logits = feeder.prefill(prompt.input_ids)
        while True:
            chosen = sampler(logits, tokens[:, :end], end - width)
            tokens[:, end] = chosen if pad is None else torch.where(going, chosen, pad)
            end += 1
            _tell(streamer, tokens[:, end - 1])
            for condition in conditions:
                going = going & ~condition(tokens[:, :end])
            if end == width + limit or not bool(going.any()):
                return tokens[:, :end]
            logits = feeder.step(tokens[:, end - 1 : end])
    finally:
        if streamer is not None:
            streamer.end()


def _tell(streamer: Streamer | None, tokens: Tensor) -> None:
    if streamer is not None:
        streamer.put(tokens.cpu())


def _extended(mask: Tensor, limit: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), limit)], dim=1)


def _min_new_tokens(config: GenerationConfig, width: int) -> int:
    if config.min_new_tokens is not None:
        return config.min_new_tokens
    return (config.min_length or 0) - width


def _seen_tokens(prompt: Prompt, vocab_size: int) -> Tensor:
    """bool [B, V]: the tokens of each prompt, padding not counted."""
    ids = prompt.input_ids
    if prompt.attention_mask is not None:
        ids = ids.masked_fill(prompt.attention_mask == 0, vocab_size)
    seen = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids, True)[:, :vocab_size]


def _check_numbers(scores: Tensor, step: int) -> None:
    """A row needs one finite score at least and no NaN; amax carries NaN and +inf up, and -inf if there is no other."""
    sound = scores.amax(dim=1).isfinite()
    if not bool(sound.all()):
        row = int(sound.logical_not().nonzero()[0])
        raise MoebiusError(
            f"step {step}: the logits of row {row} have a NaN or an infinity at their top; no token was chosen",
            advice="check the weights (moebius inspect --check-tensors), or compute in float32",
        )
