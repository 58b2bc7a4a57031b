"""Masks: key j is seen by query i iff i - W < j <= i and it is no padding."""

import pytest
import torch

from moebius.layers.masks import causal_masks, in_sight

STATES = torch.zeros(1)


def mask_of(window, attention_mask, tokens, past):
    return causal_masks([window], attention_mask, tokens, past, STATES)[window]


def visible(window, attention_mask, tokens, past) -> list[list[int]]:
    mask = mask_of(window, attention_mask, tokens, past)
    assert mask is not None
    return (mask[0, 0] == 0).int().tolist()


@pytest.mark.parametrize("window", [None, 4, 9])
def test_no_mask_is_built_where_plain_causal_attention_is_meant(window):
    assert mask_of(window, None, 4, 0) is None
    assert mask_of(window, torch.ones(2, 4), 4, 0) is None
    assert mask_of(window, torch.ones(2, 9), 1, 8) is None


def test_a_chunk_after_a_cache_sees_the_cache_and_its_own_past():
    assert visible(None, None, 2, 2) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_padding_is_hidden_but_a_padded_position_sees_itself():
    found = visible(None, torch.tensor([[0, 0, 1, 1]]), 4, 0)
    assert found == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_window_hides_what_is_further_back():
    assert visible(2, None, 4, 0) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_columns_are_the_keys_in_sight_alone():
    assert visible(2, None, 2, 7) == [[1, 1, 0], [0, 1, 1]]
    assert visible(4, torch.tensor([[0] * 6 + [1, 1]]), 1, 7) == [[0, 0, 1, 1]]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 20), (5, 0), (5, 2), (9, 20)])
def test_window_and_sight_together_are_the_definition(window, tokens, past):
    padding = torch.ones(2, past + tokens)
    padding[1, : past // 2 + 1] = 0
    mask = mask_of(window, padding, tokens, past)
    assert mask is not None
    keys = in_sight(torch.arange(past + tokens)[None, None, :, None], tokens, window).flatten()
    for row in range(2):
        for query in range(past, past + tokens):
            seen = {int(key) for key in keys[mask[row, 0, query - past] == 0]}
            near = {key for key in range(query + 1) if window is None or key > query - window}
            assert seen == {key for key in near if padding[row, key] or key == query}


def test_one_forward_makes_one_mask_a_window():
    masks = causal_masks({None, 2, 3}, None, 4, 0, STATES)
    assert masks[None] is None
    assert {window for window, mask in masks.items() if mask is not None} == {2, 3}
