"""Token windows: pure functions of (seed, step) that visit all of the text."""

import pytest
import torch

from moebius.errors import InputError
from moebius.training.data import TokenWindows


def windows(**changes) -> TokenWindows:
    return TokenWindows(**{"tokens": torch.arange(1000), "batch_size": 4, "seq_len": 16, "seed": 3, **changes})


def test_a_batch_is_made_of_unbroken_stretches_of_the_text():
    batch = windows().batch(5)
    assert batch.shape == (4, 16)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(16).expand(4, -1))


def test_a_batch_depends_on_seed_and_step_alone():
    assert torch.equal(windows().batch(7), windows().batch(7))
    assert not torch.equal(windows().batch(7), windows().batch(8))
    assert not torch.equal(windows().batch(7), windows(seed=4).batch(7))


def test_an_epoch_visits_each_of_its_tokens_once():
    source = windows(batch_size=1)
    seen = torch.cat([source.batch(step)[0] for step in range(source.windows)])
    assert len(seen.unique()) == len(seen) == source.windows * 16
    assert len(seen) > 1000 - 2 * 16


def test_the_next_epoch_cuts_the_text_elsewhere_and_in_another_order():
    source = windows(batch_size=1)
    first, second = (
        [int(source.batch(epoch * source.windows + step)[0, 0]) for step in range(source.windows)] for epoch in (0, 1)
    )
    assert first != second
    assert sorted(first) != sorted(second)


def test_a_text_shorter_than_a_window_is_refused_with_both_sizes():
    with pytest.raises(InputError, match=r"20 tokens; windows of 16 need 31"):
        windows(tokens=torch.arange(20))
    assert windows(tokens=torch.arange(31)).windows == 1
