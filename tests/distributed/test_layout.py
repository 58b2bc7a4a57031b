"""Who has which expert, for any numbers of experts and ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.distributed.layout import ExpertLayout
from moebius.errors import ArgumentError

LAYOUTS = st.builds(ExpertLayout, st.integers(0, 2048), st.integers(1, 1024))


@given(LAYOUTS)
def test_every_expert_is_held_once_and_in_order(layout):
    held = [expert for rank in range(layout.ranks) for expert in layout.experts_of(rank)]
    assert held == list(range(layout.num_experts))


@given(LAYOUTS)
def test_no_rank_holds_two_more_than_another(layout):
    counts = [len(layout.experts_of(rank)) for rank in range(layout.ranks)]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(("experts", "ranks"), [(-1, 2), (8, 0)])
def test_impossible_numbers_are_refused(experts, ranks):
    with pytest.raises(ArgumentError, match="cannot be shared"):
        ExpertLayout(experts, ranks)
