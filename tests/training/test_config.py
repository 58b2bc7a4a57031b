"""Training settings: refused when out of range, all at once; the learning rate is a pure function of the step."""

import subprocess
import sys

import pytest

from moebius.errors import ArgumentError
from moebius.training.config import TrainingConfig, learning_rate_at


def test_every_setting_out_of_range_is_named_at_once():
    with pytest.raises(ArgumentError) as caught:
        TrainingConfig(
            steps=0,
            batch_size=0,
            seq_len=1,
            learning_rate=float("nan"),
            warmup_steps=-1,
            weight_decay=-0.1,
            betas=(0.9, 1.0),
            epsilon=0.0,
            max_grad_norm=-1.0,
            schedule="linear",  # pyright: ignore[reportArgumentType]
            balance_scope="global",  # pyright: ignore[reportArgumentType]
        )
    named = {fault.where for fault in caught.value.faults}
    assert named == {
        "steps",
        "batch_size",
        "seq_len",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "betas",
        "epsilon",
        "max_grad_norm",
        "schedule",
        "balance_scope",
    }


def test_the_learning_rate_warms_up_linearly_then_falls_as_half_a_cosine():
    config = TrainingConfig(steps=110, learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(config, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_a_constant_schedule_stays_at_its_peak():
    config = TrainingConfig(steps=50, learning_rate=0.3, warmup_steps=5, schedule="constant")
    assert {learning_rate_at(config, step) for step in range(5, 50)} == {0.3}


def test_the_config_loads_no_torch():
    code = "import sys, moebius.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
