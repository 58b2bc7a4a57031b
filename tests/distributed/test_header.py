"""What ranks tell each other before a step: that they share a batch, or how many tokens each brings."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.distributed.header import checksum, numbers_of
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError
from moebius.generation.cache import KeyValueCache
from moebius.layers.decoder import Decoder
from tests.distributed.decoders import parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks

Given = Mapping[str, Any]
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
        ([[5, 6, 7], [5, 6, 7], [5, 7, 6]], ["rank 2: input_ids: not as on rank 0"]),
        ([[5, 6, 7], [5, 6], [5, 6, 7]], ["rank 1: length: 2 tokens, rank 0 has 3"]),
        ([[5, 6], [5], [6, 5]], ["rank 1: length: 1 tokens", "rank 2: input_ids: not as on rank 0"]),
    ],
)
def test_a_shared_batch_that_is_not_shared_is_refused_on_every_rank(prompts, named):
    errors = run_ranks(3, refusal, prompts)
    assert len(set(errors)) == 1
    assert all(text in errors[0] for text in [*named, 'batch="distinct"'])


def test_other_masks_are_not_shared_either():
    errors = run_ranks(3, refusal, [[5, 6, 7]] * 3, [[0, 1, 1], [0, 1, 1], [0, 0, 1]])
    assert len(set(errors)) == 1
    assert "rank 2: attention_mask: not as on rank 0" in errors[0]


@pytest.mark.parametrize("masks", [None, [None, [1, 1, 1], None], [[0, 1, 1]] * 3])
def test_a_shared_batch_passes(masks):
    assert run_ranks(3, refusal, [[5, 6, 7]] * 3, masks) == [None] * 3


IDS_OF_ALL = torch.tensor([[5, 6, 7]])


def refusals(ranks: Ranks, wholes: list[tuple[Given, Given]]) -> list[str | None]:
    """What is said where rank 2 is given the second, and the others the first."""
    decoder, _ = parallel_decoder(whole_decoder("mixtral"), ranks, "shared")
    said: list[str | None] = []
    for usual, other in wholes:
        given = {**(other if ranks.rank == 2 else usual)}
        if "cache" in given:
            given["cache"] = cache_of(decoder, length=given["cache"])
        try:
            decoder(IDS_OF_ALL, **given)
            said.append(None)
        except ArgumentError as error:
            said.append(str(error).splitlines()[0])
    return said


def cache_of(decoder: Decoder, length: int) -> KeyValueCache:
    """Of zeros."""
    cache = KeyValueCache.for_decoder(decoder.config, batch=1, capacity=9, dtype=torch.float32, device="cpu")
    for layer in cache.layers:
        layer.keys.zero_()
        layer.values.zero_()
    cache.advance(length)
    return cache


LABELS, OTHER_LABELS = torch.tensor([[-100, 6, 7]]), torch.tensor([[-100, -100, 7]])
PLACES, OTHER_PLACES = torch.tensor([[4, 5, 6]]), torch.tensor([[4, 6, 8]])
NOT_SHARED: dict[str, tuple[Given, Given]] = {
    "labels": ({"labels": LABELS}, {"labels": OTHER_LABELS}),
    "labels, output_router_logits": ({"output_router_logits": True}, {"labels": LABELS, "output_router_logits": True}),
    "position_ids": ({"position_ids": PLACES}, {"position_ids": OTHER_PLACES}),
    "labels, position_ids": ({"labels": LABELS, "position_ids": PLACES}, {"labels": PLACES, "position_ids": LABELS}),
    "cache": ({"cache": 4}, {"cache": 5}),
    "output_router_logits": ({"labels": LABELS}, {"labels": LABELS, "output_router_logits": True}),
}
SHARED: list[tuple[Given, Given]] = [
    (ALL := {"labels": LABELS, "position_ids": PLACES, "cache": 4}, ALL),
    ({}, {"cache": 0, "attention_mask": torch.ones(1, 3)}),
    ({"output_router_logits": True}, {"logits_to_keep": 1}),
    ({"labels": LABELS}, {"labels": LABELS, "output_router_logits": False}),
]


def test_whatever_else_changes_a_shared_step_is_compared_and_named():
    headline = 'the batch is "shared", and ranks were given something else than rank 0'
    for found in run_ranks(3, refusals, [*NOT_SHARED.values(), *SHARED]):
        named = [f"{headline}: rank 2: {name}: not as on rank 0" for name in NOT_SHARED]
        assert found == [*named, *[None] * len(SHARED)]


class Reads(TorchDispatchMode):
    """Counts how often a number is read: each time, a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_what_is_compared_is_read_at_once():
    given = {"input_ids": IDS_OF_ALL, "attention_mask": LABELS, "labels": LABELS, "position_ids": PLACES}
    with Reads() as reads:
        numbers = numbers_of(whole_decoder("mixtral"), given)
    assert len(set(numbers[:4])) == 4
    assert reads.count == 0  # numbers are read as a list, which is no scalar's read


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


def give_embeddings(ranks: Ranks) -> str:
    decoder, _ = parallel_decoder(whole_decoder("mixtral"), ranks, "shared")
    with pytest.raises(TypeError) as caught:
        decoder(inputs_embeds=torch.zeros(1, 2, 64))
    return str(caught.value)


def test_what_the_decoder_does_not_take_it_refuses_by_its_name():
    assert all("inputs_embeds" in said for said in run_ranks(2, give_embeddings))
