"""Latent attention against its formula, its own two forms against each other, and DeepSeek's modules.

B batch, T tokens, N channels of a head without position, R with, V of its value.
"""

import math
from typing import Any

import pytest
import torch

from moebius.config import LatentAttention, RmsNorm, Rope, Yarn
from moebius.generation.cache import Extent, KeyValueLayer
from moebius.layers.latent_attention import LatentAttentionLayer
from moebius.layers.masks import causal_masks
from moebius.layers.quantized import QuantizedLinear
from moebius.layers.rope import rotary_tables
from moebius.quantization.forms import BlockFp8

HIDDEN, EPS = 48, 1e-6
YARN = Yarn(40.0, 32, mscale=0.7, mscale_all_dim=1.3)
SHAPES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None},
    {"v_head_dim": 20, "bias": True},
    {"rope": Rope(100.0, 8, interleaved=False), "num_heads": 3},
]
NAMES = ["lora", "plain-queries", "wide-values-bias", "halves"]


def layer(dtype=torch.float64, **changes) -> LatentAttentionLayer:
    rope = Rope(100.0, 8, interleaved=True, yarn=YARN)
    fields = {"num_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "v_head_dim": 10}
    fields |= {"qk_rope_head_dim": 8, "rope": rope, "norm": RmsNorm(EPS)}
    made = LatentAttentionLayer(LatentAttention(**(fields | changes)), HIDDEN).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 1.5 * noise * parameter.shape[-1] ** -0.5)
    return made


def tables(made: LatentAttentionLayer, tokens: int, past: int = 0, dtype=torch.float64):
    return rotary_tables(made.config.rope, torch.arange(past, past + tokens)[None], dtype)


def turned(states: torch.Tensor, made: LatentAttentionLayer) -> torch.Tensor:
    """states [B, heads, T, R], each pair a complex number that is multiplied by that of its position."""
    cos, sin = tables(made, states.shape[2])
    half = states.shape[-1] // 2
    turn = torch.complex(cos[..., :half], sin[..., half:])
    if made.config.rope.interleaved:
        first, second = states[..., 0::2], states[..., 1::2]
    else:
        first, second = states[..., :half], states[..., half:]
    product = torch.complex(first, second) * turn
    return torch.cat([product.real, product.imag], dim=-1)


def rms(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def by_heads(made: LatentAttentionLayer, states: torch.Tensor) -> torch.Tensor:
    """Head by head, with every key and value written out: [B, T, H]."""
    config, tokens = made.config, states.shape[1]
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank is None:
        queries = made.q_proj(states)
    else:
        queries = made.q_b_proj(rms(made.q_a_proj(states), made.q_a_layernorm.weight))
    latent, shared = made.kv_a_proj_with_mqa(states).split([config.kv_lora_rank, rope], -1)
    expanded = made.kv_b_proj(rms(latent, made.kv_a_layernorm.weight))
    shared_key = turned(shared[:, None], made)[:, 0]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    magnitude = 1.0 if config.rope.yarn is None else 0.1 * 1.3 * math.log(40.0) + 1
    outputs = []
    for head in range(config.num_heads):
        query = queries.unflatten(-1, (config.num_heads, -1))[:, :, head]
        key, value = expanded.unflatten(-1, (config.num_heads, -1))[:, :, head].split([nope, config.v_head_dim], -1)
        scores = query[..., :nope] @ key.mT + turned(query[:, None, :, nope:], made)[:, 0] @ shared_key.mT
        scores = (scores * magnitude**2 / (nope + rope) ** 0.5).masked_fill(hidden, float("-inf"))
        outputs.append(scores.softmax(-1) @ value)
    return made.o_proj(torch.cat(outputs, -1))


def new_cache(made: LatentAttentionLayer, batch: int, capacity: int, dtype=torch.float64):
    extent = Extent(0, capacity)
    keys, values = (
        torch.full((batch, capacity, *shape), float("nan"), dtype=dtype) for shape in made.config.cache_shapes
    )
    return KeyValueLayer(keys, values, extent), extent


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
@pytest.mark.parametrize("tokens", [1, 9, 140])
def test_it_is_its_formula_with_every_gradient(changes, tokens):
    made, states = layer(**changes), torch.randn(2, tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [states, *made.parameters()]
    found, expected = made(states, tables(made, tokens), None, None), by_heads(made, states)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(output, inputs, grad) for output in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("changes", SHAPES, ids=NAMES)
@pytest.mark.parametrize("chunks", [(1,) * 9, (6, 1, 1, 1), (3, 5, 1)])
def test_through_a_cache_it_equals_the_whole(changes, chunks):
    made, states = layer(**changes), torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    cache, extent = new_cache(made, 2, 12)
    found = []
    for part in states.split(chunks, dim=1):
        tokens, past = part.shape[1], extent.length
        mask = causal_masks([None], None, tokens, past, states)[None]
        found.append(made(part, tables(made, tokens, past), mask, cache))
        extent.length += tokens
    torch.testing.assert_close(torch.cat(found, 1), by_heads(made, states))


def test_left_padding_in_the_cache_is_not_seen_by_the_absorbed_form():
    made, states = layer(), torch.randn(1, 7, HIDDEN, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 3, HIDDEN, dtype=torch.float64), states], 1)
    real = torch.tensor([[0] * 3 + [1] * 7])
    positions = torch.tensor([[0] * 3 + list(range(7))])
    cos, sin = rotary_tables(made.config.rope, positions, torch.float64)
    cache, extent = new_cache(made, 1, 10)
    for part in (slice(0, 9), slice(9, 10)):
        mask = causal_masks([None], real[:, : part.stop], part.stop - part.start, part.start, states)[None]
        last = made(padded[:, part], (cos[:, :, part], sin[:, :, part]), mask, cache)
        extent.length = part.stop
    torch.testing.assert_close(last[:, -1], by_heads(made, states)[:, -1])


def test_only_latent_and_shared_key_are_cached():
    made = layer()
    cache, _ = new_cache(made, 2, 5)
    made(torch.randn(2, 5, HIDDEN, dtype=torch.float64), tables(made, 5), None, cache)
    assert (cache.keys.shape, cache.values.shape) == ((2, 5, 1, 16), (2, 5, 1, 8))
    assert cache.keys.isfinite().all()
    assert cache.values.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 6])
def test_bfloat16_stays_and_is_near(tokens):
    made = layer(torch.bfloat16)
    states = torch.randn(2, tokens, HIDDEN).bfloat16()
    cache, _ = new_cache(made, 2, 8, torch.bfloat16)
    found = made(states, tables(made, tokens, dtype=torch.bfloat16), None, cache)
    expected = by_heads(made.double(), states.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_quantized_projection_serves_both_forms():
    made, states = layer(torch.float32, kv_lora_rank=32), torch.randn(1, 5, HIDDEN)
    plain = layer(torch.float32, kv_lora_rank=32)
    held = QuantizedLinear(made.kv_b_proj, BlockFp8())
    with torch.no_grad():
        held.weight.copy_(made.kv_b_proj.weight.to(torch.float8_e4m3fn))
        held.weight_scale.fill_(0.5)
        made.kv_b_proj.weight.copy_(held.plain_weight(torch.float32))
    plain.load_state_dict(made.state_dict())
    made.kv_b_proj = held
    for chunks in ((5,), (4, 1)):
        outputs = []
        for each in (made, plain):
            cache, extent = new_cache(each, 1, 5, torch.float32)
            for part in states.split(chunks, dim=1):
                past = extent.length
                last = each(part, tables(each, part.shape[1], past, torch.float32), None, cache)
                extent.length += part.shape[1]
            outputs.append(last)
        torch.testing.assert_close(*outputs)


def test_what_has_no_plain_matrix_cannot_be_absorbed():
    made = layer()
    made.kv_b_proj = torch.nn.Sequential(made.kv_b_proj)
    states, cache = torch.randn(1, 1, HIDDEN, dtype=torch.float64), new_cache(made, 1, 1)[0]
    with pytest.raises(TypeError, match="kv_b_proj: Sequential"):
        made(states, tables(made, 1), None, cache)


def test_biases_stand_where_deepseek_has_them():
    with_bias = {name for name in layer(bias=True).state_dict() if name.endswith("bias")}
    assert with_bias == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}
    assert not any(name.endswith("bias") for name in layer().state_dict())


@pytest.mark.parametrize("version", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_module_of_transformers(version, q_lora_rank, bias):
    from transformers import AutoConfig
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    config = AutoConfig.for_model(
        version,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        rope_theta=100.0,
        max_position_embeddings=1280,
        rope_scaling=scaling | {"mscale": 0.7, "mscale_all_dim": 1.3},
        attention_bias=bias,
        attn_implementation="eager",
    )
    made, states = layer(torch.float32, q_lora_rank=q_lora_rank, bias=bias), torch.randn(2, 40, HIDDEN)
    match version:
        case "deepseek_v2":
            oracle, rotary = v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
        case _:
            oracle, rotary = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    oracle.load_state_dict(made.state_dict())
    positions = torch.arange(40)[None]
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    expected = oracle(states, position_embeddings=rotary(states, positions), attention_mask=mask)[0]
    found = made(states, tables(made, 40, dtype=torch.float32), None, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
