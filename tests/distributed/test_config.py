"""DistributedConfig: what it takes, how it arranges ranks, what it refuses."""

import pytest

from moebius.distributed.config import DistributedConfig, Grid
from moebius.errors import ArgumentError

ENABLED = DistributedConfig(enable_expert_parallel=True)


@pytest.mark.parametrize(("ranks", "experts", "ep"), [(1, 8, 1), (4, 128, 4), (3, 128, 3), (16, 8, 8), (6, 4, 3)])
def test_by_default_all_ranks_share_the_experts_or_as_many_as_there_are_experts_for(ranks, experts, ep):
    assert ENABLED.grid(ranks, experts) == Grid(1, ranks // ep, ep, 1)


def test_an_ep_size_is_taken_as_it_is_even_where_a_rank_then_has_no_expert():
    assert DistributedConfig(ep_size=4).grid(4, 3) == Grid(1, 1, 4, 1)


def test_without_either_every_rank_holds_all_experts():
    assert DistributedConfig().grid(4, 8) == Grid(1, 4, 1, 1)


def test_states_are_sharded_over_the_ranks_that_fsdp_names():
    assert DistributedConfig(ep_size=2, fsdp_size=4).grid(8, 8) == Grid(2, 2, 2, 4)


def test_places_within_a_set_of_experts_run_fastest():
    assert [Grid(1, 2, 3, 1).place(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "ranks", "names"),
    [
        ({"ep_size": 3}, 4, "ep_size: does not divide"),
        ({"fsdp_size": 3}, 4, "fsdp_size: does not fit"),
        ({"ep_size": 4, "fsdp_size": 2}, 4, "fsdp_size: does not fit"),
        ({"ep_size": 2, "dp_replicate_size": 3}, 4, "dp_replicate_size: does not divide"),
    ],
)
def test_sizes_that_do_not_fit_the_ranks_are_refused(fields, ranks, names):
    with pytest.raises(ArgumentError, match=names):
        DistributedConfig(**fields).grid(ranks, 8)


def test_a_size_that_was_not_given_is_not_named():
    with pytest.raises(ArgumentError) as refused:
        DistributedConfig(ep_size=3).grid(4, 8)
    assert [fault.where for fault in refused.value.faults] == ["ep_size"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"ep_size": 0}, "ep_size: too small"),
        ({"batch": "own"}, "batch: unknown"),
        ({"exchange": "mail"}, "exchange: unknown"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"batch": "distinct", "exchange": "all_reduce"}, "one batch that all ranks share"),
        ({"exchange": "all_to_all"}, "do not share"),
        ({"exchange": "all2all"}, "exchange: unknown"),
        ({"batch": ["shared"]}, r"batch: unknown: expected .*, found \['shared'\]"),
        ({"ep_size": "2"}, "ep_size: type: expected a whole number or None, found '2'"),
        ({"ep_size": 1.0}, "ep_size: type: .* found 1.0"),
        ({"ep_size": True}, "ep_size: type: .* found True"),
        ({"fsdp_size": None}, "fsdp_size: type: expected a whole number, found None"),
        ({"dp_replicate_size": [2]}, "dp_replicate_size: type"),
        ({"enable_expert_parallel": "no"}, "enable_expert_parallel: type: expected True or False, found 'no'"),
        ({"timeout_seconds": "60"}, "timeout_seconds: type: expected a number or None, found '60'"),
        ({"timeout_seconds": True}, "timeout_seconds: type"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds: out of range: .* found inf"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds: out of range: .* found nan"),
        ({"timeout_seconds": 1e10}, "timeout_seconds: out of range"),
    ],
)
def test_values_out_of_range_are_refused(fields, names):
    with pytest.raises(ArgumentError, match=names) as refused:
        DistributedConfig(**fields)
    assert len(refused.value.faults) == 1


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ArgumentError) as refused:
        DistributedConfig("no", "2", 0, 1.5, "own", "mail", float("inf"))  # pyright: ignore[reportArgumentType]
    assert [fault.where for fault in refused.value.faults] == [
        "enable_expert_parallel",
        "ep_size",
        "fsdp_size",
        "dp_replicate_size",
        "batch",
        "exchange",
        "timeout_seconds",
    ]


@pytest.mark.parametrize("seconds", [None, 5, 0.5, 7 * 24 * 3600.0, 1e9])
def test_a_timeout_may_be_any_number_of_seconds_that_torch_can_count_or_none(seconds):
    assert DistributedConfig(timeout_seconds=seconds).timeout_seconds == seconds
