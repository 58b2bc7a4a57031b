"""Grouped-query attention, its mask, and the protocol of the cache that it writes to.

B batch, T tokens of this forward, P tokens in the cache before it, H hidden, D head_dim, H_kv key-value heads.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.config import GroupedQueryAttention, RmsNorm
from moebius.layers.norm import RmsNormLayer
from moebius.layers.rope import RotaryTables, apply_rotary


class LayerCache(Protocol):
    """The keys and values of one layer."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H_kv, T, D]; return all so far, [B, H_kv, P+T, D]."""
        ...


class Cache(Protocol):
    """What a decoder needs of a cache: `length` is P; `advance` is called once, at the end of a forward."""

    @property
    def length(self) -> int: ...

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    def advance(self, tokens: int) -> None: ...


def causal_mask(attention_mask: Tensor | None, tokens: int, past: int, hidden_states: Tensor) -> Tensor | None:
    """The additive mask [B or 1, 1, T, P+T] in hidden_states' dtype, or None where plain causal attention is meant.

    attention_mask: [B, P+T], 1 real and 0 padding, or None.  Whether it has padding is read once, on the host.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (past == 0 or tokens == 1):
        return None
    query = torch.arange(past, past + tokens, device=hidden_states.device).unsqueeze(-1)
    key = torch.arange(past + tokens, device=hidden_states.device)
    visible = (key <= query)[None, None]
    if attention_mask is not None:
        # a padded position still sees itself: a row without any key would be NaN
        visible = visible & attention_mask.bool()[:, None, None] | (key == query)
    return torch.zeros_like(visible, dtype=hidden_states.dtype).masked_fill_(~visible, float("-inf"))


SHORT = 128  # tokens; measured on two cores, where both forms take the same time from there on


class GroupedQueryAttentionLayer(nn.Module):
    """softmax(q k^T / sqrt(D)) v, where heads / H_kv query heads share a key and value head (Ainslie et al. 2023).

    [B, T, H] -> [B, T, H].
    """

    def __init__(self, config: GroupedQueryAttention, hidden_size: int, norm: RmsNorm) -> None:
        super().__init__()
        self.config = config
        query_width, key_width = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = _query_key_norms(config, norm, query_width, key_width)

    def forward(
        self, hidden_states: Tensor, rotary: RotaryTables, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """rotary, mask: see `rotary_tables`, `causal_mask`.  cache: appended to, and attended to as a whole."""
        query = apply_rotary(self._heads(self.q_proj(hidden_states), self.q_norm), rotary)
        key = apply_rotary(self._heads(self.k_proj(hidden_states), self.k_norm), rotary)
        value = self._heads(self.v_proj(hidden_states), None)
        if cache is not None:
            key, value = cache.update(key, value)
        attended = _decode(query, key, value, mask) if query.shape[2] == 1 else _attend(query, key, value, mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: RmsNormLayer | None) -> Tensor:
        """projected [B, T, heads * D] -> [B, heads, T, D], normalised on the way at the width that the config says."""
        if norm is not None and self.config.qk_norm == "full":
            projected, norm = norm(projected), None
        heads = projected.unflatten(-1, (-1, self.config.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)


def _query_key_norms(
    config: GroupedQueryAttention, norm: RmsNorm, query_width: int, key_width: int
) -> tuple[RmsNormLayer | None, RmsNormLayer | None]:
    match config.qk_norm:
        case "none":
            return None, None
        case "head":
            return RmsNormLayer(norm, config.head_dim), RmsNormLayer(norm, config.head_dim)
        case "full":
            return RmsNormLayer(norm, query_width), RmsNormLayer(norm, key_width)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [B, heads, T, D], key and value [B, H_kv, P+T, D] -> [B, heads, T, D].  Without a mask P is 0: causal."""
    if mask is None and query.shape[2] <= SHORT and query.device.type == "cpu" and query.requires_grad:
        return _attend_short(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)


def _attend_short(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `_attend` without a mask, as plain products, for training on short sequences: on a CPU the backward of torch's
    fused attention runs on one thread."""
    batch, heads, tokens, head_dim = query.shape
    hidden = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype).triu_(1)
    rows = query.reshape(batch * key.shape[1], -1, head_dim)  # the heads that share a key, one after another
    keys, values = key.reshape(len(rows), tokens, head_dim), value.reshape(len(rows), tokens, head_dim)
    repeated = hidden.repeat(heads // key.shape[1], 1)
    scores = torch.baddbmm(repeated, rows, keys.transpose(1, 2), alpha=head_dim**-0.5)
    return (scores.softmax(dim=-1) @ values).view_as(query)


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As `_attend` for T = 1, where the heads that share a key stand as its rows: a third of the time on a CPU."""
    batch, heads, _, head_dim = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    return F.scaled_dot_product_attention(rows, key, value, mask).reshape_as(query)
