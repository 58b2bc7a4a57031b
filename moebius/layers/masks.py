"""Which keys each query sees.

B batch, T tokens of this forward, P tokens in the cache before it, W sliding window, S keys in sight: P + T of them, or
with a window the last W - 1 + T, the others being out of every query's window.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def causal_masks(
    windows: Iterable[int | None], attention_mask: Tensor | None, tokens: int, past: int, hidden_states: Tensor
) -> dict[int | None, Tensor | None]:
    """For each window (None: no bound) the additive mask [B or 1, 1, T, S] in hidden_states' dtype, or None where plain
    causal attention over the keys in sight is meant.

    attention_mask: [B, P+T], 1 real and 0 padding, or None.  Whether it has padding is read once, on the host.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    real = attention_mask.bool() if attention_mask is not None and padded else None
    return {window: _causal_mask(window, real, tokens, past, hidden_states) for window in windows}


def in_sight(states: Tensor, tokens: int, window: int | None) -> Tensor:
    """Of keys or values [B, heads, P+T, D], those that any of the last T queries sees: a view [B, heads, S, D]."""
    return states if window is None else states[:, :, -(window - 1 + tokens) :]


def _causal_mask(window: int | None, real: Tensor | None, tokens: int, past: int, states: Tensor) -> Tensor | None:
    """real: bool [B, P+T], or None where nothing is padding."""
    if real is None and (tokens == 1 or (past == 0 and (window is None or tokens <= window))):
        return None
    first = 0 if window is None else max(0, past - window + 1)
    query = torch.arange(past, past + tokens, device=states.device).unsqueeze(-1)
    key = torch.arange(first, past + tokens, device=states.device)
    visible = key <= query if window is None else (key <= query) & (key > query - window)
    visible = visible[None, None]
    if real is not None:
        # a padded position still sees itself: a row without any key would be NaN
        visible = visible & real[:, None, None, first:] | (key == query)
    return torch.zeros_like(visible, dtype=states.dtype).masked_fill_(~visible, float("-inf"))
