"""What "auto" chooses, as a table, and why a backend cannot run."""

import pytest
import torch

from moebius.experts.fused import obstacles
from moebius.experts.select import Situation, backend_obstacles, select_backend

HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "forms", "capability", "needs_grad", "chosen"),
    [
        ("cpu", torch.float32, (64, 32), (), None, False, "grouped_mm"),
        ("cpu", torch.bfloat16, (64, 32), (), None, False, "grouped_mm"),
        ("cpu", torch.float64, (9, 5), (), None, True, "grouped_mm"),
        ("cpu", torch.float32, (64, 64), ("int4_pack",), None, False, "cpu"),
        ("cpu", torch.float32, (64, 64), ("int4_pack",), None, True, "eager"),
        ("cuda", torch.bfloat16, (2048, 768), (), HOPPER, False, "fused"),
        ("cuda", torch.bfloat16, (2048, 100), (), HOPPER, True, "fused"),
        ("cuda", torch.float16, (2048, 768), ("mxfp4",), HOPPER, True, "fused"),
        ("cuda", torch.bfloat16, (2048, 768), (), (7, 5), False, "grouped_mm"),
        ("cuda", torch.bfloat16, (2048, 100), (), (7, 5), False, "eager"),
        ("cuda", torch.float32, (2048, 100), (), HOPPER, False, "grouped_mm"),
        ("cuda", torch.float64, (2048, 768), (), HOPPER, False, "eager"),
        ("cuda", torch.float32, (2048, 768), ("int8_row",), HOPPER, False, "eager"),
        ("mps", torch.bfloat16, (2048, 768), (), None, False, "eager"),
    ],
)
def test_auto_takes_the_first_that_can_run(device, dtype, sizes, forms, capability, needs_grad, chosen, monkeypatch):
    monkeypatch.setattr(obstacles, "_triton_obstacles", list)
    situation = Situation(device, dtype, *sizes, forms, capability, needs_grad)
    assert select_backend(situation).name == chosen


def test_without_triton_auto_says_so_and_takes_grouped_mm(monkeypatch):
    monkeypatch.setattr(obstacles.importlib.util, "find_spec", lambda name: None)
    choice = select_backend(Situation("cuda", torch.bfloat16, 64, 64, (), HOPPER))
    assert choice.name == "grouped_mm"
    assert "fused cannot run: triton is not installed" in choice.reason


def test_every_obstacle_is_named():
    found = backend_obstacles("grouped_mm", Situation("cuda", torch.float64, 3, 5, ("mxfp4",)))
    assert [obstacle.split()[0] for obstacle in found] == ["weights", "dtype", "hidden_size", "intermediate_size"]


def test_eager_and_a_users_backend_have_no_obstacle_here():
    anywhere = Situation("mps", torch.float64, 3, 5)
    assert backend_obstacles("eager", anywhere) == backend_obstacles("mine", anywhere) == []


def test_the_choice_gives_its_reason():
    assert "float64" in select_backend(Situation("cuda", torch.float64, 64, 64)).reason
