"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

B batch, T tokens of this forward, P tokens in the cache before it, S = P + T, H hidden, L width of the latent of keys
and values, N channels of a head without position, R with, V of its value.
"""

import torch
from torch import Tensor, nn

from moebius.config import LatentAttention
from moebius.layers.attention import LayerCache
from moebius.layers.dot_product import dot_product_attention
from moebius.layers.norm import RmsNormLayer
from moebius.layers.quantized import QuantizedLinear
from moebius.layers.rope import RotaryTables, apply_rotary, softmax_scale_factor


class LatentAttentionLayer(nn.Module):
    """Keys and values of all heads are projections of one latent a token; one rotated key a token serves all heads.

    A cache keeps the normalised latent and that key, L + R numbers a token.  [B, T, H] -> [B, T, H].
    """

    def __init__(self, config: LatentAttention, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scale = head_dim**-0.5 * softmax_scale_factor(config.rope)
        self._make_queries(hidden_size, config.num_heads * head_dim)
        latents = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, latents, bias=config.bias)
        self.kv_a_layernorm = RmsNormLayer(config.norm, config.kv_lora_rank)
        expanded = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.v_head_dim, hidden_size, bias=config.bias)

    def _make_queries(self, hidden_size: int, width: int) -> None:
        match self.config.q_lora_rank:
            case None:
                self.q_proj = nn.Linear(hidden_size, width, bias=False)
            case rank:
                self.q_a_proj = nn.Linear(hidden_size, rank, bias=self.config.bias)
                self.q_a_layernorm = RmsNormLayer(self.config.norm, rank)
                self.q_b_proj = nn.Linear(rank, width, bias=False)

    def forward(
        self, hidden_states: Tensor, rotary: RotaryTables, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """rotary, mask: see `rotary_tables`, `causal_masks`.  cache: appended to, and attended to as a whole."""
        query, turned_query = self._queries(hidden_states, rotary)
        latent, key = self._latents(hidden_states, rotary)
        if cache is not None:
            latent, key = cache.update(latent, key)
        absorbed = cache is not None and query.shape[2] == 1
        attend = self._attend_absorbed if absorbed else self._attend_expanded
        return self.o_proj(attend(query, turned_query, latent, key, mask).transpose(1, 2).flatten(2))

    def _queries(self, hidden_states: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor]:
        """Without position [B, heads, T, N], and rotated [B, heads, T, R]."""
        match self.config.q_lora_rank:
            case None:
                projected = self.q_proj(hidden_states)
            case _:
                projected = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        heads = projected.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        query, turned = heads.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return query, apply_rotary(turned, rotary, interleaved=self.config.rope.interleaved)

    def _latents(self, hidden_states: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor]:
        """The normalised latent [B, 1, T, L], and the rotated key [B, 1, T, R]."""
        projected = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, key = projected.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent), apply_rotary(key, rotary, interleaved=self.config.rope.interleaved)

    def _attend_expanded(
        self, query: Tensor, turned_query: Tensor, latent: Tensor, turned_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Keys and values of each head made from latents: the fewest operations where there are many queries.

        query [B, heads, T, N], turned_query [B, heads, T, R], latent [B, 1, S, L], turned_key [B, 1, S, R]
        -> [B, heads, T, V].
        """
        heads = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        key, value = heads.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=-1)
        keys = torch.cat((key, turned_key.expand(-1, self.config.num_heads, -1, -1)), dim=-1)
        return dot_product_attention(torch.cat((query, turned_query), dim=-1), keys, value, mask, scale=self.scale)

    def _attend_absorbed(
        self, query: Tensor, turned_query: Tensor, latent: Tensor, turned_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """As `_attend_expanded` for T = 1, over the latents themselves: q (W c) = (W^T q) c, and so for values."""
        matrices = _matrix(self.kv_b_proj, query.dtype).unflatten(0, (self.config.num_heads, -1))
        to_key, to_value = matrices.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1)
        latents, turned_keys = latent.squeeze(1), turned_key.squeeze(1)
        rows = _by_head(query.squeeze(2), to_key)
        scores = torch.baddbmm(turned_query.squeeze(2) @ turned_keys.mT, rows, latents.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        scores = scores if mask is None else scores + mask.squeeze(1)
        mixed = scores.softmax(dim=-1).to(latents.dtype) @ latents
        return _by_head(mixed, to_value.mT).unsqueeze(2)


def _matrix(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a projection, for products that it does not make itself."""
    match projection:
        case QuantizedLinear():
            return projection.plain_weight(dtype)
        case nn.Linear():
            return projection.weight
        case _:
            raise TypeError(f"kv_b_proj: {type(projection).__name__} has no plain matrix to absorb into queries")


def _by_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows [B, heads, n] times each head's own [heads, n, m] -> [B, heads, m]."""
    return (rows.transpose(0, 1) @ matrices).transpose(0, 1)
