"""When a row has ended: an end-of-sequence id, a stop string, a criterion of the caller's. B rows, n tokens so far."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moebius.errors import ArgumentError
from moebius.generation.config import GenerationConfig
from moebius.tokenizer.token_bytes import TokenBytes

Criterion = Callable[[Tensor], Tensor]
Agree = Callable[[Tensor], Tensor]
"""What this process has decided, of any shape and dtype -> what all decide that generate the same."""


def alone(decided: Tensor) -> Tensor:
    """The Agree of one process."""
    return decided


class EndOfSequence:
    def __init__(self, token_ids: Sequence[int], device: torch.device):
        self._token_ids = torch.tensor(token_ids, device=device)

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens[:, -1], self._token_ids)


class StopStrings:
    """True where the last token completes a stop string, alone or with the tokens before it, the prompt's too.

    Compared as bytes, so a token that ends within a character hides nothing. What the token holds beyond the stop
    string stays, as in transformers.
    """

    def __init__(self, texts: Sequence[str], token_bytes: TokenBytes):
        self._targets = [text.encode() for text in texts]
        self._reach = max(map(len, self._targets))
        self._token_bytes = token_bytes

    def __call__(self, tokens: Tensor) -> Tensor:
        tails = tokens[:, -self._reach - 1 :].tolist()
        return torch.tensor([self._completes(tail) for tail in tails], device=tokens.device)

    def _completes(self, tail: list[int]) -> bool:
        *before, last = (self._token_bytes(token_id) for token_id in tail)
        text = b"".join(before)
        # A match must take in a byte of the last token: it starts at most len(target) - 1 before that token.
        return any(target in text[max(0, len(text) - len(target) + 1) :] + last for target in self._targets if last)


class CallerCriteria:
    """transformers' stopping criteria: called with (input_ids, None), giving a bool or a bool tensor [B].

    They may look at a clock, or at anything else that other processes see otherwise: what they say is agreed on.
    """

    def __init__(self, criteria: Iterable[Callable[..., Any]], agree: Agree):
        self._criteria, self._agree = list(criteria), agree

    def __call__(self, tokens: Tensor) -> Tensor:
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for criterion in self._criteria:
            done = done | torch.as_tensor(criterion(tokens, None), dtype=torch.bool, device=tokens.device)
        return self._agree(done)


def stop_conditions(
    config: GenerationConfig,
    tokenizer: Any,
    criteria: Iterable[Callable[..., Any]],
    device: torch.device,
    agree: Agree = alone,
) -> list[Criterion]:
    """What ends a row, for these settings. Raises ArgumentError for stop strings without a tokenizer to read them."""
    conditions: list[Criterion] = []
    if config.eos_token_id:
        conditions.append(EndOfSequence(config.eos_token_id, device))
    if config.stop_strings:
        if tokenizer is None:
            raise ArgumentError("stop_strings need the tokenizer", advice="generate(..., tokenizer=tokenizer)")
        conditions.append(StopStrings(config.stop_strings, TokenBytes(tokenizer.backend_tokenizer)))
    if criteria := list(criteria):
        conditions.append(CallerCriteria(criteria, agree))
    return conditions
