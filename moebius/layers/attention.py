"""Grouped-query attention, and the protocol of the cache that attention writes to.

B batch, T tokens of this forward, P tokens in the cache before it, S keys in sight, H hidden, D head_dim, H_kv
key-value heads.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from moebius.config import GroupedQueryAttention, RmsNorm
from moebius.layers.dot_product import dot_product_attention
from moebius.layers.masks import in_sight
from moebius.layers.norm import RmsNormLayer
from moebius.layers.rope import RotaryTables, apply_rotary


class LayerCache(Protocol):
    """The two tensors that one layer keeps of each token: `cache_shapes` of its config says which."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [B, heads, T, channels]; return all so far, [B, heads, P+T, channels]."""
        ...


class Cache(Protocol):
    """What a decoder needs of a cache: `length` is P; `advance` is called once, at the end of a forward."""

    @property
    def length(self) -> int: ...

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    def advance(self, tokens: int) -> None: ...


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
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.sinks else None

    def forward(
        self, hidden_states: Tensor, rotary: RotaryTables, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """rotary, mask: see `rotary_tables`, `causal_masks`.  cache: appended to; attended to is what is in sight."""
        query = self._turned(self._heads(self.q_proj(hidden_states), self.q_norm), rotary)
        key = self._turned(self._heads(self.k_proj(hidden_states), self.k_norm), rotary)
        value = self._heads(self.v_proj(hidden_states), None)
        if cache is not None:
            key, value = cache.update(key, value)
        window = self.config.sliding_window
        key, value = (in_sight(states, query.shape[2], window) for states in (key, value))
        scale = self.config.head_dim**-0.5
        attended = dot_product_attention(query, key, value, mask, scale=scale, sinks=self.sinks, window=window)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _turned(self, heads: Tensor, rotary: RotaryTables) -> Tensor:
        return apply_rotary(heads, rotary, interleaved=self.config.rope.interleaved)

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
