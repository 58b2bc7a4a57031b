"""Rotary embedding is a rotation by position * theta^(-2i/R) of the pairs (i, i + R/2), or (2i, 2i + 1); YaRN changes
these frequencies, and the length of what is rotated.
"""

import math

import pytest
import torch

from moebius.config import Rope, Yarn
from moebius.layers.rope import (
    apply_rotary,
    attention_factor,
    inverse_frequencies,
    rotary_tables,
    softmax_scale_factor,
)

ROPE = Rope(theta=100.0, rotary_dim=8)
INTERLEAVED = Rope(theta=100.0, rotary_dim=8, interleaved=True)

GPT_OSS = Rope(1.5e5, 64, yarn=Yarn(32.0, 4096, truncate=False))
V3 = Rope(1e4, 64, interleaved=True, yarn=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
V2_LITE = Rope(1e4, 64, interleaved=True, yarn=Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707))
K2 = Rope(5e4, 64, interleaved=True, yarn=Yarn(32.0, 4096, 1.0, 1.0, mscale=1.0, mscale_all_dim=1.0))
ODD = [
    Rope(123.0, 10, yarn=Yarn(7.3, 77, 5.0, 0.4, mscale=1.7, mscale_all_dim=0.6)),
    Rope(1e4, 64, yarn=Yarn(4.0, 4096, 1.0, 1.0, truncate=False)),  # both bounds are one
    Rope(1e4, 64, yarn=Yarn(4.0, 3, 32.0, 32.0)),  # both bounds below the first channel
    Rope(1e4, 64, yarn=Yarn(4.0, 6, 1.0, 1.0)),  # both bounds at it
    Rope(1e4, 16, yarn=Yarn(4.0, 2**40, 3.0, 1.0)),  # both beyond the last
    Rope(1e4, 64, yarn=Yarn(1.0, 4096)),
    Rope(1e4, 64, yarn=Yarn(0.5, 4096, mscale=2.0, mscale_all_dim=3.0)),
    Rope(1e4, 64, yarn=Yarn(8.0, 4096, mscale=0.0, mscale_all_dim=0.5)),
    Rope(1e4, 64, yarn=Yarn(8.0, 4096, mscale=0.7)),
    Rope(1e4, 64, yarn=Yarn(8.0, 4096, attention_factor=1.25)),
]


def rotated(states: torch.Tensor, position_ids: torch.Tensor, rope: Rope = ROPE) -> torch.Tensor:
    return apply_rotary(states, rotary_tables(rope, position_ids, states.dtype), interleaved=rope.interleaved)


def test_each_pair_turns_by_its_own_angle():
    states = torch.randn(1, 2, 3, 8)
    found = rotated(states, torch.tensor([[0, 1, 5]]))
    for pair in range(4):
        angle = 5 * 100.0 ** (-2 * pair / 8)
        first, second = states[0, 1, 2, pair], states[0, 1, 2, pair + 4]
        expected = first * math.cos(angle) - second * math.sin(angle)
        torch.testing.assert_close(found[0, 1, 2, pair], expected)
    torch.testing.assert_close(found[:, :, 0], states[:, :, 0])


def test_interleaved_pairs_come_out_as_halves():
    states = torch.randn(2, 3, 4, 12)
    halves = torch.cat([states[..., 0:8:2], states[..., 1:8:2], states[..., 8:]], dim=-1)
    positions = torch.randint(0, 99, (2, 4))
    assert torch.equal(rotated(states, positions, INTERLEAVED), rotated(halves, positions))


@pytest.mark.parametrize("rope", [ROPE, INTERLEAVED], ids=["halves", "interleaved"])
def test_channels_past_rotary_dim_stay(rope):
    states = torch.randn(1, 2, 3, 12)
    assert torch.equal(rotated(states, torch.arange(3)[None], rope)[..., 8:], states[..., 8:])


@pytest.mark.parametrize("rope", [ROPE, INTERLEAVED], ids=["halves", "interleaved"])
def test_products_depend_on_distance_alone(rope):
    states = torch.randn(2, 1, 1, 1, 8)
    near, far = (
        [rotated(one, torch.tensor([[place]]), rope) for one, place in zip(states, places, strict=True)]
        for places in ((3, 0), (50, 47))
    )
    torch.testing.assert_close((near[0] * near[1]).sum(), (far[0] * far[1]).sum())


@pytest.mark.parametrize("rope", [ROPE, INTERLEAVED, ODD[0]], ids=["halves", "interleaved", "yarn"])
@pytest.mark.parametrize("width", [10, 12])
def test_the_gradient_is_the_rotation_back(width, rope):
    states = torch.randn(2, 2, 3, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotated(x, torch.arange(6).view(2, 3), rope), states)


@pytest.mark.parametrize("rope", [GPT_OSS, V3, V2_LITE, K2, *ODD])
def test_yarn_is_that_of_transformers(rope):
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = rope.yarn
    given = {name: getattr(yarn, name) for name in ("mscale", "mscale_all_dim", "attention_factor", "truncate")}
    given |= {"factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
    given |= {"original_max_position_embeddings": yarn.original_max_position_embeddings, "rope_theta": rope.theta}
    config = DeepseekV3Config(qk_rope_head_dim=rope.rotary_dim, rope_parameters={"rope_type": "yarn", **given})
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(inverse_frequencies(rope), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(yarn) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("rope", "tables", "scores"), [(GPT_OSS, 1.3466, 1.0), (V3, 1.0, 1.8739), (V2_LITE, 1.0, 1.5896)]
)
def test_published_models_have_their_factors(rope, tables, scores):
    cos, sin = rotary_tables(rope, torch.arange(5)[None], torch.float64)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, tables), rtol=0, atol=5e-5)
    assert softmax_scale_factor(rope) == pytest.approx(scores, abs=5e-5)


def test_yarn_keeps_fast_channels_and_slows_slow_ones():
    plain, blended = inverse_frequencies(Rope(1e4, 64)), inverse_frequencies(V3)
    turns = plain * 4096 / (2 * math.pi)
    assert torch.equal(blended[turns > 40], plain[turns > 40])
    torch.testing.assert_close(blended[turns < 0.5], plain[turns < 0.5] / 40)
    between = (turns < 30) & (turns > 1.1)
    assert between.any()
    assert ((blended < plain) & (blended > plain / 40))[between].all()


def test_scores_are_not_scaled_without_mscale_all_dim():
    assert [softmax_scale_factor(rope) for rope in (ROPE, GPT_OSS, ODD[-2])] == [1.0, 1.0, 1.0]
