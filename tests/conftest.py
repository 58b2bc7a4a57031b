"""Tests share the machine: one intra-op thread is as fast on tiny models, and steadier."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
