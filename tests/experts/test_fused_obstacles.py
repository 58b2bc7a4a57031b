"""Where the fused kernels cannot run, every reason is said; without triton too."""

import importlib.util

import pytest
import torch

from moebius.experts.fused import obstacles
from moebius.experts.fused.obstacles import fused_obstacles


@pytest.fixture
def triton(monkeypatch):
    """triton, there or not, by `triton(True)` or `triton(False)`."""

    def stand_in(is_there: bool) -> None:
        found = importlib.util.find_spec("torch") if is_there else None
        monkeypatch.setattr(obstacles.importlib.util, "find_spec", lambda name: found)

    return stand_in


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_none_where_they_run(triton, dtype, capability):
    triton(True)
    assert fused_obstacles("cuda", capability, dtype, ["int4_pack"]) == []


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "is_there", "said"),
    [
        ("cpu", None, torch.bfloat16, True, "device cpu"),
        ("cuda", (7, 5), torch.bfloat16, True, "compute capability 7.5"),
        ("cuda", (9, 0), torch.float32, True, "torch.float32"),
        ("cuda", (9, 0), torch.bfloat16, False, "triton is not installed"),
    ],
)
def test_the_one_reason_is_named(triton, device, capability, dtype, is_there, said):
    triton(is_there)
    (reason,) = fused_obstacles(device, capability, dtype)
    assert said in reason


def test_all_reasons_are_named_at_once(triton):
    triton(False)
    assert len(fused_obstacles("cpu", None, torch.float64)) == 3
