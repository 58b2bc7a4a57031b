"""What ranks tell each other before a step: that they share a batch, or how many tokens each brings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebius.distributed.header import checksum
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError
from tests.distributed.decoders import parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks

IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=12)


@given(IDS, IDS)
def test_a_checksum_tells_ids_apart(one, other):
    assert (checksum(torch.tensor([one])) == checksum(torch.tensor([other]))) == (one == other)


def test_a_checksum_tells_shapes_and_places_apart():
    ids = torch.tensor([[1, 2], [3, 4]])
    others = [ids.flip(1), ids.flip(0), ids.view(1, 4), ids.view(4, 1)]
    assert checksum(ids) not in [checksum(other) for other in others]


def refusal(ranks: Ranks, prompts: list[list[int]], masks: list[list[int] | None] | None = None) -> str | None:
    decoder, _ = parallel_decoder(whole_decoder("mixtral"), ranks, "shared")
    mask = masks and masks[ranks.rank]
    try:
        decoder(torch.tensor([prompts[ranks.rank]]), attention_mask=mask and torch.tensor([mask]))
    except ArgumentError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([[5, 6, 7], [5, 6, 7], [5, 7, 6]], ["rank 2: input_ids or attention_mask: 3 tokens, not those of rank 0"]),
        ([[5, 6, 7], [5, 6], [5, 6, 7]], ["rank 1: length: 2 tokens, rank 0 has 3"]),
        ([[5, 6], [5], [6, 5]], ["rank 1: length: 1 tokens", "rank 2: input_ids or attention_mask: 2 tokens"]),
    ],
)
def test_a_shared_batch_that_is_not_shared_is_refused_on_every_rank(prompts, named):
    errors = run_ranks(3, refusal, prompts)
    assert len(set(errors)) == 1
    assert all(text in errors[0] for text in [*named, 'batch="distinct"'])


def test_other_masks_are_not_shared_either():
    errors = run_ranks(3, refusal, [[5, 6, 7]] * 3, [[0, 1, 1], [0, 1, 1], [0, 0, 1]])
    assert len(set(errors)) == 1
    assert "rank 2: input_ids or attention_mask" in errors[0]


@pytest.mark.parametrize("masks", [None, [None, [1, 1, 1], None], [[0, 1, 1]] * 3])
def test_a_shared_batch_passes(masks):
    assert run_ranks(3, refusal, [[5, 6, 7]] * 3, masks) == [None] * 3


def tell_when_done(ranks: Ranks) -> list[bool]:
    """Rank r is done after r + 1 steps, and goes on with nothing."""
    decoder, header = parallel_decoder(whole_decoder("mixtral"), ranks, "distinct")
    told = []
    for step in range(4):
        header.done = step > ranks.rank
        decoder(torch.ones(0 if header.done else 1, 1, dtype=torch.int64))
        told.append(header.all_done)
    return told


def test_ranks_that_are_done_go_on_without_tokens_until_all_are():
    assert run_ranks(3, tell_when_done) == [[False, False, False, True]] * 3
