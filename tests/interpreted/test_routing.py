"""`route` gives what a stable sort gives, and tiles that cover every row that is ours once."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import torch

from moebius.experts.fused import routing
from moebius.experts.fused.routing import Routing, route


def random_index(tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Some ids are foreign: -1 and num_experts."""
    return torch.randint(-1, num_experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))


def assert_sorted(found: Routing, index: torch.Tensor, num_experts: int) -> None:
    ids = index.flatten()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    sorted_ids, order = ids.sort(stable=True)
    assert torch.equal(found.order.long(), order)
    assert torch.equal(found.inverse.long()[order], torch.arange(len(ids)))
    assert torch.equal(found.offsets.long(), torch.searchsorted(sorted_ids, torch.arange(num_experts + 1)))


def assert_covered(found: Routing) -> None:
    offsets, block_m = found.offsets.tolist(), found.block_m
    tiles = [
        (expert, row) for expert in range(found.num_experts) for row in range(*offsets[expert : expert + 2], block_m)
    ]
    listed = list(zip(found.tile_expert.tolist(), found.tile_row.tolist(), strict=True))
    assert found.num_tiles.tolist() == [len(tiles)]
    assert listed[: len(tiles)] == tiles
    assert all(expert == -1 for expert, _ in listed[len(tiles) :])


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "block_m"),
    [(0, 2, 8, 16), (1, 8, 128, 16), (17, 3, 3, 64), (50, 8, 160, 32), (60, 2, 7, 128)],
)
def test_slots_ranked_among_all_stand_by_expert(tokens, top_k, num_experts, block_m):
    index = random_index(tokens, top_k, num_experts)
    found = route(index, num_experts, block_m)
    assert_sorted(found, index, num_experts)
    assert_covered(found)


@pytest.fixture
def small_chunks(monkeypatch):
    """Few slots already are sorted in chunks: large sorts are slow here."""
    monkeypatch.setattr(routing, "RANKED_SLOTS", 32)
    monkeypatch.setattr(routing, "chunk_slots", lambda rows: 32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "block_m"), [(40, 8, 16, 64), (205, 3, 5, 16), (33, 1, 160, 128)]
)
def test_programs_a_chunk_sort_by_expert(small_chunks, tokens, top_k, num_experts, block_m):
    index = random_index(tokens, top_k, num_experts)
    found = route(index, num_experts, block_m)
    assert_sorted(found, index, num_experts)
    assert_covered(found)


def test_slots_are_ranked_among_those_of_every_step(monkeypatch):
    monkeypatch.setattr(routing, "KEYS_A_STEP", 64)
    index = random_index(133, 1, 40)
    found = route(index, 40, 16)
    assert_sorted(found, index, 40)
    assert_covered(found)


@pytest.mark.parametrize("tokens", [10, 100])
def test_one_hot_expert_and_empty_ones(small_chunks, tokens):
    index = torch.full((tokens, 2), 6)
    found = route(index, 8, 16)
    assert_sorted(found, index, 8)
    assert_covered(found)


@pytest.mark.parametrize("foreign", [-1, 8, 2**40])
def test_all_ids_foreign_leave_no_tile(foreign):
    index = torch.full((5, 2), foreign)
    found = route(index, 8, 16)
    assert_sorted(found, index, 8)
    assert found.num_tiles.tolist() == [0]
    assert found.tile_expert.eq(-1).all()


def test_a_strided_index_is_read_as_it_stands():
    index = random_index(17, 3, 8)
    assert_sorted(route(index.t().contiguous().t(), 8, 16), index, 8)
