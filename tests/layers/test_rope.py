"""Rotary embedding is a rotation by position * theta^(-2i/R) of the pairs (i, i + R/2)."""

import math

import pytest
import torch

from moebius.config import Rope
from moebius.layers.rope import apply_rotary, rotary_tables

ROPE = Rope(theta=100.0, rotary_dim=8)


def rotated(states: torch.Tensor, position_ids: torch.Tensor, rope: Rope = ROPE) -> torch.Tensor:
    return apply_rotary(states, rotary_tables(rope, position_ids, states.dtype))


def test_each_pair_turns_by_its_own_angle():
    states = torch.randn(1, 2, 3, 8)
    found = rotated(states, torch.tensor([[0, 1, 5]]))
    for pair in range(4):
        angle = 5 * 100.0 ** (-2 * pair / 8)
        first, second = states[0, 1, 2, pair], states[0, 1, 2, pair + 4]
        expected = first * math.cos(angle) - second * math.sin(angle)
        torch.testing.assert_close(found[0, 1, 2, pair], expected)
    torch.testing.assert_close(found[:, :, 0], states[:, :, 0])


def test_channels_past_rotary_dim_stay():
    states = torch.randn(1, 2, 3, 12)
    assert torch.equal(rotated(states, torch.arange(3)[None])[..., 8:], states[..., 8:])


def test_products_depend_on_distance_alone():
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(rotated(query, torch.tensor([[p]])) * rotated(key, torch.tensor([[p - 3]]))).sum() for p in (3, 50)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("width", [8, 12])
def test_the_gradient_is_the_rotation_back(width):
    states = torch.randn(2, 2, 3, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotated(x, torch.arange(6).view(2, 3)), states)
