"""What a generation starts from, checked. B rows, P prompt tokens a row, padding included."""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.config import DecoderConfig
from moebius.errors import ArgumentError, InputError
from moebius.generation.config import GenerationConfig

DEFAULT_NEW_TOKENS = 20  # transformers' default
LEFT_PADDING = 'pad on the left: tokenizer.padding_side = "left"'

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """input_ids: int64 [B, P].  attention_mask: int64 [B, P], 0 for left padding; None when there is none."""

    input_ids: Tensor
    attention_mask: Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Real tokens in each row."""
        rows, width = self.input_ids.shape
        return [width] * rows if self.attention_mask is None else self.attention_mask.sum(dim=1).tolist()

    def repeated(self, times: int) -> "Prompt":
        """Each row `times` times over, next to each other."""
        if times == 1:
            return self
        mask = self.attention_mask
        return Prompt(
            self.input_ids.repeat_interleave(times, dim=0),
            None if mask is None else mask.repeat_interleave(times, dim=0),
        )


def checked_ids(input_ids: object) -> Tensor:
    """Token ids as generate takes them. Raises ArgumentError for what is no int64 or int32 tensor of two dimensions."""
    if not isinstance(input_ids, Tensor):
        raise ArgumentError(
            f"input_ids should be a tensor [B, P], found {type(input_ids).__name__}",
            advice='tokenizer(text, return_tensors="pt"), then generate(**encoding)',
        )
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"input_ids should be int64 [B, P], found {input_ids.dtype} {list(input_ids.shape)}")
    return input_ids


def read_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig, vocab_size: int, device: torch.device
) -> Prompt:
    """Check, and move to `device`. Raises InputError naming the row and what is wrong with it, ArgumentError (mask)."""
    if input_ids.numel() == 0:
        raise InputError(f"the prompt is empty: input_ids is {list(input_ids.shape)}")
    ids = input_ids.to(device=device, dtype=torch.int64)
    _check_ids(ids, vocab_size)
    mask = infer_mask(ids, config) if attention_mask is None else _checked_shape(attention_mask, ids)
    return Prompt(ids, _left_padding(mask))


def infer_mask(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """As transformers infers it: from the pad token, if it is set and does not end sequences too."""
    pad = config.pad_token_id
    if pad is None or pad in (config.eos_token_id or ()):
        return None
    return (ids != pad).long()


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise InputError(
            f"input_ids[{row}, {column}] is {ids[row, column].item()}; the model's ids are 0 to {vocab_size - 1}",
            advice="encode with this model's own tokenizer",
        )


def _checked_shape(mask: Tensor, ids: Tensor) -> Tensor:
    if mask.shape != ids.shape:
        raise ArgumentError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; they should be alike")
    return mask.to(ids.device).long()


def _left_padding(mask: Tensor | None) -> Tensor | None:
    """The mask if it pads on the left, None if it pads nothing; any other is refused."""
    if mask is None or bool((mask == 1).all()):
        return None
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError("attention_mask should hold 1 for real tokens and 0 for padding, nothing else")
    for row, flags in enumerate(mask.tolist()):
        _check_row(row, flags)
    return mask


def _check_row(row: int, flags: list[int]) -> None:
    if not any(flags):
        raise InputError(f"the prompt is empty: row {row} is padding alone")
    if flags[-1] == 0:
        raise InputError(f"row {row} is padded on the right, where generation goes on", advice=LEFT_PADDING)
    if flags != sorted(flags):
        raise InputError(
            f"row {row} has padding between its tokens (attention_mask, or the pad token's id where no mask is given)",
            advice=LEFT_PADDING + ", and pass the tokenizer's attention_mask",
        )


def new_token_limit(config: GenerationConfig, decoder: DecoderConfig, prompt: Prompt) -> int:
    """How many tokens may follow. Raises InputError, naming the most that fit, if the model has too few positions."""
    longest = max(prompt.lengths)
    room = decoder.max_position_embeddings - longest
    wanted = _wanted_tokens(config, prompt.input_ids.shape[1], room)
    if wanted > room or room < 1:
        raise InputError(
            f"a prompt of {longest} tokens and {wanted} new ones exceed the model's {decoder.max_position_embeddings} "
            "positions",
            advice=f"max_new_tokens={room} at most" if room > 0 else "shorten the prompt",
        )
    return wanted


def _wanted_tokens(config: GenerationConfig, width: int, room: int) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        _say_default()
        return max(1, min(DEFAULT_NEW_TOKENS, room))
    if config.max_length <= width:
        raise ArgumentError(
            f"max_length={config.max_length} leaves nothing to generate after a prompt of {width} tokens",
            advice="set max_new_tokens, which does not count the prompt",
        )
    return config.max_length - width


@functools.cache
def _say_default() -> None:
    logger.warning("neither max_new_tokens nor max_length is set: %d new tokens", DEFAULT_NEW_TOKENS)
