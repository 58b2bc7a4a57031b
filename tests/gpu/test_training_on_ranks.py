"""On two GPUs: training with experts on both, in float32, is that of one process; with FSDP2, too."""

import pytest
import torch

from tests.distributed.pool import run_ranks
from tests.distributed.test_training import DISTINCT, Case, assert_as_alone, trained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

CASES = [
    Case(2, 4, DISTINCT),
    Case(2, 5, {**DISTINCT, "exchange": "all_to_all"}, "layer"),
    Case(2, 5, {"enable_expert_parallel": True}),
    Case(2, 5, {"ep_size": 2, "batch": "distinct", "fsdp_size": 2}),
    Case(2, 5, {"ep_size": 1, "batch": "distinct", "fsdp_size": 2}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps_are_those_of_one_process(case):
    assert_as_alone(run_ranks(2, trained, case, device="cuda"), case)
