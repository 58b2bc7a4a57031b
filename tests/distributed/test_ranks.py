"""Ranks agree, or fail together; who is not there is named."""

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moebius.distributed.ranks import _check_devices, device_of
from moebius.errors import ArgumentError, CheckpointError, Fault, RankError
from tests.distributed.pool import run_ranks


def agree(ranks: Any) -> tuple[Any, ...]:
    ranks.meet("agreeing", 20)
    return ranks.gathered(10 * ranks.rank, "counting"), ranks.told(f"said by {ranks.rank}", "telling")


def test_every_rank_learns_what_all_said_and_what_rank_0_told():
    assert run_ranks(3, agree) == [([0, 10, 20], "said by 0")] * 3


def fail_alone(ranks: Any, error: Exception) -> str:
    try:
        with ranks.together("loading"):
            if ranks.rank == 1 or ranks.size == 1:
                raise error
    except Exception as caught:  # noqa: BLE001  # what is raised is the result
        return f"{type(caught).__name__}: {caught}"
    return "went on"


@pytest.mark.parametrize(
    ("error", "own", "others"),
    [
        (
            CheckpointError("cut short", faults=[Fault("a.safetensors", "size")], advice="fetch it again"),
            "CheckpointError: cut short: a.safetensors: size\nwhat to do: fetch it again",
            "CheckpointError: rank 1: cut short: a.safetensors: size\nwhat to do: fetch it again",
        ),
        (KeyError("x"), "KeyError: 'x'", "RankError: rank 1: KeyError: 'x'"),
    ],
)
def test_an_error_of_one_rank_is_an_error_of_all_and_says_whose(error, own, others):
    assert run_ranks(3, fail_alone, error) == [others, own, others]


def fail_while_others_are_gone(ranks: Any) -> str:
    with mock.patch.object(ranks, "gathered", side_effect=RankError("not all answered")):
        return fail_alone(ranks, CheckpointError("cut short"))


def test_where_the_others_do_not_answer_a_ranks_own_error_is_the_one_it_ends_with():
    assert run_ranks(1, fail_while_others_are_gone) == ["CheckpointError: cut short"]


def test_too_few_gpus_for_the_ranks_of_a_host_are_told_of(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_of(None) == torch.device("cpu")
    assert "2 ranks on this host and 1 GPUs: all run on the CPU" in caplog.text


def come_late(ranks: Any, late: int) -> str:
    def meet(seconds: float) -> str:
        try:
            ranks.meet("saving", seconds)
        except RankError as error:
            return error.message
        return "met"

    early = "" if ranks.rank == late else meet(0.5)
    ranks.gathered(None, "waiting for the others")
    said = early or meet(20)
    ranks.meet("saving again", 20)
    return said


@pytest.mark.parametrize("late", [0, 2])
def test_who_does_not_come_is_named_and_so_is_who_left_and_the_next_meeting_works(late):
    found = run_ranks(3, come_late, late)
    others = ", ".join(str(rank) for rank in range(3) if rank != late)
    assert found.pop(late) == f"rank {late}: saving: rank {others} of 3 came, and left before this rank was there"
    assert all(said.endswith(f"saving: rank {late} of 3 did not come within 0.5 s") for said in found)


def decide_after(ranks: Any, late: int) -> str:
    """The others give up, and find that the late one has just seen them all."""
    if ranks.rank == late:
        ranks._store.compare_set(f"moebius/{ranks.roll_call.group.group_name}/{ranks._meetings + 1}/met", "", "yes")
    ranks.gathered(None, "waiting for the others")
    try:
        time.sleep(0.6 if ranks.rank == late else 0)
        ranks.meet("saving", 20 if ranks.rank == late else 0.3)
    except RankError as error:
        return error.message
    return "met"


def test_ranks_that_all_came_agree_that_they_met():
    assert run_ranks(2, decide_after, 1) == ["met"] * 2


def fail_on_the_way(ranks: Any) -> str:
    """Rank 1 fails before a step within the step, at which the others wait for it."""
    try:
        with ranks.together("opening"), ranks.together("loading"):
            if ranks.rank == 1:
                raise CheckpointError("cut short")
            ranks.gathered(ranks.rank, "looking for the files")
    except (CheckpointError, RankError) as error:
        return str(error)
    return "went on"


def test_an_error_on_the_way_is_not_taken_for_an_answer():
    found = run_ranks(3, fail_on_the_way)
    assert found == ["rank 1: cut short", "cut short", "rank 1: cut short"]


def leave_the_way(ranks: Any) -> str:
    try:
        if ranks.rank == 1:
            with ranks.together("loading"):
                return "went on"
        ranks.gathered(ranks.rank, "looking for the files")
    except RankError as error:
        return error.message
    return "went on"


def test_ranks_at_different_steps_are_told_so():
    found = run_ranks(2, leave_the_way)
    assert found == [
        "rank 0: looking for the files: rank 1 is at the end of a step",
        "rank 1: loading: rank 0 is at another step",
    ]


def hang_in_a_part(ranks: Any) -> tuple[str, bool]:
    """Of two pairs one waits for a rank that does not come."""
    with mock.patch.object(ranks, "_seconds", 0.5):
        pairs = ranks.axes(pair=ranks.size // 2, member=2)
    said = "went on"
    if ranks.rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=pairs.get_group("member"))
        except RuntimeError as error:
            said = str(error)
    ranks.gathered(None, "waiting for rank 0")
    return said, ranks.axes(pair=ranks.size // 2, member=2) is pairs


def test_groups_of_some_ranks_have_the_jobs_time_limit_and_are_made_once():
    found = run_ranks(4, hang_in_a_part)
    assert "500ms" in found[0][0]
    assert all(same for _, same in found)


def test_ranks_on_different_kinds_of_devices_are_told_so_before_they_wait_for_one_another():
    store = dist.HashStore()
    store.set("device/0", "cuda")
    with pytest.raises(ArgumentError, match="rank 1 would run on cpu, rank 0 on cuda"):
        _check_devices(store, 1, 2, "cpu")
