"""The state of a run on disk: what goes on from it goes on to the bit, and what does not fit is refused."""

import copy
import json

import pytest
import torch

from moebius.errors import ArgumentError, CheckpointError
from moebius.training.config import TrainingConfig
from moebius.training.data import TokenWindows
from moebius.training.states import FILE, StateFolder
from moebius.training.trainer import train

BATCHES = TokenWindows(torch.arange(2000) % 7 + 3 * (torch.arange(2000) % 5), batch_size=4, seq_len=12).batch


def settings(steps: int, **changes) -> TrainingConfig:
    given = {"batch_size": 4, "seq_len": 12, "learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.1}
    return TrainingConfig(steps=steps, **{**given, **changes})


def test_a_run_that_was_cut_goes_on_to_the_bit(decoder, tmp_path):
    whole, other = copy.deepcopy(decoder), copy.deepcopy(decoder)
    expected = train(whole, BATCHES, settings(6)).records
    train(decoder, BATCHES, settings(3), states=StateFolder(tmp_path / "state"))
    rest = train(other, BATCHES, settings(6), states=StateFolder(tmp_path / "state")).records
    assert [record.step for record in rest] == [3, 4, 5]
    assert [record.loss for record in rest] == [record.loss for record in expected[3:]]
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), other.parameters(), strict=True))


def test_it_is_saved_every_so_many_steps_and_at_the_end(decoder, tmp_path):
    states, done = StateFolder(tmp_path / "state", every=2), []

    def note(record):
        stands = states.path / FILE
        done.append(json.loads(stands.read_text())["step"] if stands.exists() else 0)

    train(decoder, BATCHES, settings(5), states=states, on_step=note)
    assert done == [0, 0, 2, 2, 4]
    assert json.loads((states.path / FILE).read_text())["step"] == 5


def test_other_settings_are_another_run(decoder, tmp_path):
    train(decoder, BATCHES, settings(1), states=StateFolder(tmp_path))
    with pytest.raises(ArgumentError, match=r"learning_rate: other than before: 0.01, now 0.1"):
        train(decoder, BATCHES, settings(2, learning_rate=0.1), states=StateFolder(tmp_path))


@pytest.mark.parametrize("spoil", ["training.json", "model.safetensors"])
def test_a_state_with_a_broken_file_is_refused(decoder, tmp_path, spoil):
    train(decoder, BATCHES, settings(1), states=StateFolder(tmp_path))
    (tmp_path / spoil).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=spoil):
        train(decoder, BATCHES, settings(2), states=StateFolder(tmp_path))
