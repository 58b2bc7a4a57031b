"""What "auto" chooses, as a table, and why a backend cannot run."""

import pytest
import torch

from moebius.experts.select import Situation, backend_obstacles, select_backend


@pytest.mark.parametrize(
    ("device", "dtype", "hidden_size", "intermediate_size", "chosen"),
    [
        ("cpu", torch.float32, 64, 32, "grouped_mm"),
        ("cpu", torch.float64, 9, 5, "grouped_mm"),
        ("cuda", torch.bfloat16, 2048, 768, "grouped_mm"),
        ("cuda", torch.bfloat16, 2048, 100, "eager"),
        ("cuda", torch.float32, 2048, 100, "grouped_mm"),
        ("cuda", torch.float64, 2048, 768, "eager"),
        ("mps", torch.bfloat16, 2048, 768, "eager"),
    ],
)
def test_auto_takes_grouped_mm_where_it_can_run(device, dtype, hidden_size, intermediate_size, chosen):
    assert select_backend(Situation(device, dtype, hidden_size, intermediate_size)).name == chosen


def test_every_obstacle_is_named():
    obstacles = backend_obstacles("grouped_mm", Situation("cuda", torch.float64, 3, 5, ("mxfp4",)))
    assert [obstacle.split()[0] for obstacle in obstacles] == ["weights", "dtype", "hidden_size", "intermediate_size"]


def test_eager_and_a_users_backend_have_no_obstacle_here():
    anywhere = Situation("mps", torch.float64, 3, 5)
    assert backend_obstacles("eager", anywhere) == backend_obstacles("mine", anywhere) == []


def test_the_choice_gives_its_reason():
    assert "float64" in select_backend(Situation("cuda", torch.float64, 64, 64)).reason
