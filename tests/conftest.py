"""What every test starts from: one intra-op thread (as fast on tiny models, and steadier) and torch's seed at zero."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _steady_torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
