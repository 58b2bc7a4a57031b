"""Grouped-query attention in all its kinds: through a cache as at once, and as its formula says."""

import pytest
import torch

from moebius.config import GroupedQueryAttention, RmsNorm, Rope
from moebius.layers.attention import GroupedQueryAttentionLayer
from moebius.layers.masks import causal_masks
from moebius.layers.rope import rotary_tables

KINDS = {
    "plain": {},
    "head-norm": {"qk_norm": "head"},
    "full-norm": {"qk_norm": "full"},
    "interleaved": {"rope": Rope(100.0, 8, interleaved=True)},
    "partial": {"rope": Rope(100.0, 4)},
    "partial-interleaved": {"rope": Rope(100.0, 4, interleaved=True)},
    "window": {"sliding_window": 8},
    "sinks": {"sinks": True, "qkv_bias": True, "output_bias": True},
    "window-sinks": {"sliding_window": 8, "sinks": True},
    "window-of-one": {"sliding_window": 1, "sinks": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer(heads: int = 4, key_value_heads: int = 2, **changes) -> GroupedQueryAttentionLayer:
    config = GroupedQueryAttention(heads, key_value_heads, 8, **({"rope": Rope(100.0, 8)} | changes))
    made = GroupedQueryAttentionLayer(config, 16, RmsNorm(1e-6))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=16**-0.5 if parameter.dim() == 2 else 1.0)
    return made


def run(made, states, cache=None, past=0, real=None):
    """A forward of one layer, with the tables and the mask that a decoder gives it."""
    tokens, window = states.shape[1], made.config.sliding_window
    tables = rotary_tables(made.config.rope, torch.arange(past, past + tokens)[None], states.dtype)
    return made(states, tables, causal_masks([window], real, tokens, past, states)[window], cache)


@kinds
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("chunks", [(1,) * 24, (24, 1, 1), (5, 19, 7, 1, 1), (60,)], ids=str)
def test_through_a_cache_it_equals_the_whole(kind, heads, key_value_heads, chunks):
    made, cache = layer(heads, key_value_heads, **KINDS[kind]), ListCache()
    states = torch.randn(2, sum(chunks), 16)
    parts, past = [], 0
    for part in states.split(chunks, dim=1):
        parts.append(run(made, part, cache, past))
        past += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), run(made, states))


@kinds
def test_each_token_attends_to_its_window_alone(kind):
    """What is out of a token's window, or after it, cannot change its output; what is in it, does."""
    made, states = layer(**KINDS[kind]), torch.randn(1, 24, 16)
    window = made.config.sliding_window or 24
    before = run(made, states)
    states[:, 10] = torch.randn(16)
    changed = (run(made, states) - before).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [10 <= token < 10 + window for token in range(24)]


@kinds
def test_left_padding_changes_no_real_token(kind):
    made, states = layer(**KINDS[kind]), torch.randn(1, 20, 16)
    padded, real = torch.cat([torch.randn(1, 5, 16), states], dim=1), torch.tensor([[0] * 5 + [1] * 20])
    whole = run(made, padded, real=real)
    torch.testing.assert_close(whole[:, 5:], run(made, states), rtol=0, atol=2e-5)
    cache = ListCache()
    run(made, padded[:, :-1], cache, real=real[:, :-1])
    torch.testing.assert_close(run(made, padded[:, -1:], cache, 24, real), whole[:, -1:])


def test_a_decode_step_reads_its_window_of_the_cache_alone():
    made, cache = layer(sliding_window=8, sinks=True), ListCache()
    states = torch.randn(1, 30, 16)
    run(made, states[:, :29], cache)
    whole = run(made, states)
    for key_or_value in cache.parts[0]:
        key_or_value[:, :, : 29 - 7] = float("nan")
    torch.testing.assert_close(run(made, states[:, 29:], cache, 29), whole[:, 29:])


@kinds
def test_bfloat16_stays_and_is_near(kind):
    made, states = layer(**KINDS[kind]).bfloat16(), torch.randn(2, 24, 16).bfloat16()
    cache = ListCache()
    parts = [run(made, states[:, :23], cache), run(made, states[:, 23:], cache, 23)]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    expected = run(made.double(), states.double())
    assert (torch.cat(parts, 1).double() - expected).abs().max() < 0.03 * expected.abs().max()


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
    torch.testing.assert_close(run(grouped, states), run(copied, states))


def test_interleaved_pairs_are_halves_of_projections_in_another_order():
    interleaved, states = layer(rope=Rope(100.0, 6, interleaved=True)), torch.randn(2, 5, 16)
    halves, order = layer(rope=Rope(100.0, 6)), torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])
    state = interleaved.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = state[name].view(-1, 8, 16)[:, order].flatten(0, 1)
    halves.load_state_dict(state)
    torch.testing.assert_close(run(interleaved, states), run(halves, states))


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_window_and_sinks_are_those_of_transformers(layer_type):
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    fields = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = GptOssConfig(
        **fields, sliding_window=8, num_hidden_layers=1, layer_types=[layer_type], attention_bias=True
    )
    config._attn_implementation = "eager"
    window = 8 if layer_type == "sliding_attention" else None
    made, states = layer(sliding_window=window, sinks=True, qkv_bias=True, output_bias=True), torch.randn(2, 40, 16)
    oracle = GptOssAttention(config, 0)
    oracle.load_state_dict(made.state_dict())
    cos, sin = rotary_tables(made.config.rope, torch.arange(40)[None], torch.float32)
    halves = cos[:, 0, :, :4], sin[:, 0, :, 4:]
    hidden = torch.ones(40, 40).triu(1) + (torch.ones(40, 40).tril(-window) if window else 0)
    mask = torch.zeros(40, 40).masked_fill(hidden > 0, float("-inf"))[None, None]
    expected = oracle(states, position_embeddings=halves, attention_mask=mask)[0]
    found = run(made, states)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    grad = torch.randn_like(found)
    for output in (found, expected):
        output.backward(grad)
    theirs = dict(oracle.named_parameters())
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=2e-5)


class ListCache:
    """The plainest LayerCache."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.parts.append((key, value))
        keys, values = zip(*self.parts, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)
