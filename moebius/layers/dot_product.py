"""Scaled dot-product attention, softmax(q k^T scale) v (Vaswani et al. 2017, eq. 1), in the form that suits its shape.

B batch, T queries, S keys, D channels of queries and keys, D_v of values, H_kv key-value heads, G = heads / H_kv.
Without a mask attention is causal over S = T keys, or T is 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # tokens; measured on two cores, where both forms take the same time from there on
BLOCK = 256  # queries that share a pass over the keys in their windows


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """query [B, heads, T, D], key [B, H_kv, S, D], value [B, H_kv, S, D_v] -> [B, heads, T, D_v].

    mask: additive, [B or 1, 1, T, S].  sinks: [heads], one logit a head that takes part in the softmax, and whose share
    no value gets (gpt-oss, arXiv 2508.10925, section 2.2).  window: the mask hides keys that are so far back, or more;
    what it hides from all of a block of queries is not read.
    """
    tokens = query.shape[2]
    if not query.numel():
        return _attend_nothing(query, key, value, sinks)
    if tokens == 1:
        return _decode(query, key, value, mask, scale, sinks)
    if mask is not None and window is not None and tokens > BLOCK + window:
        return _attend_in_blocks(query, key, value, mask, scale, sinks, window)
    if sinks is not None:
        return _attend_with_sinks(query, key, value, mask, scale, sinks)
    return _attend(query, key, value, mask, scale)


def _attend_nothing(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
    """For no sequences, or no tokens: empty, and joined to the graph."""
    total = query.sum() + key.sum() + value.sum() + (0 if sinks is None else sinks.sum())
    return total.expand(*query.shape[:-1], value.shape[-1])


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sinks: Tensor | None, window: int
) -> Tensor:
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    blocks = []
    for start in range(0, tokens, BLOCK):
        first = max(0, past + start - window + 1) // 8 * 8  # a mask for fused attention begins at a whole 16 bytes
        rows, keys = slice(start, start + BLOCK), slice(first, past + start + BLOCK)
        states = query[:, :, rows], key[:, :, keys], value[:, :, keys], mask[:, :, rows, keys]
        blocks.append(dot_product_attention(*states, scale=scale, sinks=sinks))
    return torch.cat(blocks, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is None and query.shape[2] <= SHORT and query.device.type == "cpu" and query.requires_grad:
        return _attend_short(query, key, value, scale)
    return _attend_fused(query, key, value, mask, scale)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As torch has it. On a CPU it is fused only if D is D_v; else it would make all scores of all heads at once."""
    width, grouped = value.shape[-1], query.shape[1] != key.shape[1]
    if query.device.type == "cpu" and width != query.shape[-1]:
        query, key, value = _of_one_width(query, key, value)
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return attended[..., :width]


def _of_one_width(*states: Tensor) -> tuple[Tensor, ...]:
    missing = [max(each.shape[-1] for each in states) - each.shape[-1] for each in states]
    return tuple(F.pad(each, (0, width)) if width else each for each, width in zip(states, missing, strict=True))


def _attend_short(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `_attend` without a mask, as plain products, for training on short sequences: on a CPU the backward of torch's
    fused attention runs on one thread."""
    batch, heads, tokens, head_dim = query.shape
    hidden = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype).triu_(1)
    rows = query.reshape(batch * key.shape[1], -1, head_dim)  # the heads that share a key, one after another
    keys, values = key.reshape(len(rows), tokens, head_dim), value.reshape(len(rows), tokens, -1)
    repeated = hidden.repeat(heads // key.shape[1], 1)
    scores = torch.baddbmm(repeated, rows, keys.transpose(1, 2), alpha=scale)
    return (scores.softmax(dim=-1) @ values).view(batch, heads, tokens, -1)


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """The sink as a token before all others, so that fused attention serves, and no scores of all heads are kept.

    A channel is added to queries and keys in which only that token's key is 1: a query with sink / scale there has the
    sink as its logit. All other channels of the token are 0, its value too, and what it attends to is dropped.
    """
    head_dim, width = query.shape[-1], value.shape[-1]
    extra = 8 - head_dim % 8  # fused attention takes channels in eights
    query, key, value = (F.pad(states, (0, extra, 1, 0)) for states in (query, key, value))
    query[:, :, 1:, head_dim] = (sinks / scale).unsqueeze(-1)
    key[:, :, 0, head_dim] = 1
    mask = None if mask is None else F.pad(mask, (1, 0, 1, 0))
    return _attend_fused(query, key, value, mask, scale)[:, :, 1:, :width]


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """For T = 1, where the heads that share a key stand as its rows: a third of the time on a CPU."""
    batch, heads, _, _ = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    if sinks is None:
        attended = F.scaled_dot_product_attention(rows, key, value, mask, scale=scale)
    else:
        attended = _rows_with_sinks(rows, key, value, mask, scale, sinks)
    return attended.reshape(batch, heads, 1, -1)


def _rows_with_sinks(
    rows: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """rows [B, H_kv, G, D] -> [B, H_kv, G, D_v]: the plain form, which copies no key; its softmax in float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    scores = _product(rows * scale, key.transpose(2, 3)).to(wide)
    scores = scores if mask is None else scores + mask
    columns = sinks.to(wide).view(1, *rows.shape[1:3], 1).expand(len(rows), -1, -1, -1)
    weights = torch.cat((scores, columns), dim=-1).softmax(dim=-1)[..., :-1]
    return _product(weights.to(value.dtype), value)


def _product(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows @ matrices, [B, H_kv, G, n] and [B, H_kv, n, m].

    In a cache [B, H_kv] are no one stride, and torch copies such matrices first: on a CPU that takes seven times as
    long as the products.
    """
    if rows.device.type != "cpu":
        return rows @ matrices
    return torch.stack([row @ matrix for row, matrix in zip(rows, matrices, strict=True)])
