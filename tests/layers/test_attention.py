"""The mask, and attention against its formula.

B batch, T tokens, P tokens in the cache, D head_dim.
"""

import pytest
import torch

from moebius.config import GroupedQueryAttention, RmsNorm, Rope
from moebius.layers.attention import GroupedQueryAttentionLayer, causal_mask
from moebius.layers.rope import rotary_tables

STATES = torch.zeros(1)


def visible(mask: torch.Tensor) -> list[list[int]]:
    return (mask[0, 0] == 0).int().tolist()


def test_no_mask_is_built_where_plain_causal_attention_is_meant():
    assert causal_mask(None, 4, 0, STATES) is None
    assert causal_mask(torch.ones(2, 4), 4, 0, STATES) is None
    assert causal_mask(torch.ones(2, 9), 1, 8, STATES) is None


def test_a_chunk_after_a_cache_sees_the_cache_and_its_own_past():
    mask = causal_mask(None, 2, 2, STATES)
    assert mask is not None
    assert visible(mask) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_padding_is_hidden_but_a_padded_position_sees_itself():
    mask = causal_mask(torch.tensor([[0, 0, 1, 1]]), 4, 0, STATES)
    assert mask is not None
    assert visible(mask) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def layer(heads: int, key_value_heads: int, qk_norm="none") -> GroupedQueryAttentionLayer:
    config = GroupedQueryAttention(heads, key_value_heads, 8, Rope(100.0, 8), qk_norm=qk_norm)
    made = GroupedQueryAttentionLayer(config, 16, RmsNorm(1e-6))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=16**-0.5)
    return made


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (4, 1)])
def test_one_token_after_a_cache_equals_the_whole(heads, key_value_heads, qk_norm):
    attention, states = layer(heads, key_value_heads, qk_norm), torch.randn(2, 5, 16)
    tables = rotary_tables(attention.config.rope, torch.arange(5)[None], torch.float32)
    cache = ListCache()
    whole = attention(states, tables, None, None)
    attention(states[:, :4], tuple(table[:, :, :4] for table in tables), None, cache)
    last = attention(states[:, 4:], tuple(table[:, :, 4:] for table in tables), None, cache)
    torch.testing.assert_close(last, whole[:, 4:])


def test_heads_that_share_a_key_equal_copies_of_it():
    grouped, states = layer(4, 2), torch.randn(2, 5, 16)
    copied = layer(4, 4)
    copied.load_state_dict(
        grouped.state_dict()
        | {
            name: grouped.state_dict()[name].view(2, 8, 16).repeat_interleave(2, 0).flatten(0, 1)
            for name in ("k_proj.weight", "v_proj.weight")
        }
    )
    tables = rotary_tables(grouped.config.rope, torch.arange(5)[None], torch.float32)
    torch.testing.assert_close(grouped(states, tables, None, None), copied(states, tables, None, None))


class ListCache:
    """The plainest LayerCache."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.parts.append((key, value))
        keys, values = zip(*self.parts, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)
