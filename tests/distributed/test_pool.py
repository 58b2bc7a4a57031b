"""The pool of ranks that tests run on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from moebius.errors import ArgumentError, Fault
from tests.distributed.pool import run_ranks


def total(ranks, tensor):
    tensor = tensor + ranks.rank
    dist.all_reduce(tensor, group=ranks.experts)
    return os.getpid(), tensor


def fail_on(ranks, failing):
    if ranks.rank in failing:
        raise ArgumentError("no", faults=[Fault("here", f"rank {ranks.rank}")])
    dist.barrier(group=ranks.roll_call.group)


def sleep_on(ranks, rank):
    if ranks.rank == rank:
        time.sleep(30)


def test_ranks_reach_each_other_and_live_on():
    first, second = (run_ranks(2, total, torch.ones(3)) for _ in range(2))
    assert all(tensor.tolist() == [3.0] * 3 for _, tensor in first)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


@pytest.mark.parametrize("failing", [[1], [0, 1]])
def test_a_rank_s_error_is_raised_with_its_rank_and_traceback(failing):
    with pytest.raises(ArgumentError, match=f"rank {failing[0]}") as caught:
        run_ranks(2, fail_on, failing)
    assert f"on rank {failing[0]}:\nTraceback" in caught.value.__notes__[0]
    assert len(run_ranks(2, total, torch.ones(1))) == 2


def test_a_rank_that_hangs_is_killed():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(2, sleep_on, 1, seconds=1.0)
    assert len(run_ranks(2, total, torch.ones(1))) == 2
