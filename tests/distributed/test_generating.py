"""Around generation on ranks: what would have them wait for one another without end is said before it begins."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.distributed.config import Batch
from moebius.distributed.generating import generating
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError
from moebius.generation.engine import generate
from tests.distributed.decoders import parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks


def begun(ranks: Ranks, batch: Batch, limits: list[int]) -> str:
    decoder, header = parallel_decoder(whole_decoder("mixtral"), ranks, batch)
    try:
        with generating(decoder, header, {"max_new_tokens": limits[ranks.rank], "do_sample": False}):
            return ""
    except ArgumentError as error:
        return str(error)


def test_other_settings_on_a_shared_batch_are_refused_on_every_rank():
    said = run_ranks(3, begun, "shared", [8, 8, 9])
    assert said == ["generate: ranks were given different settings: rank 2: max_new_tokens: 9, rank 0 has 8"] * 3


@pytest.mark.parametrize(("batch", "limits"), [("shared", [8, 8, 8]), ("distinct", [8, 4, 9])])
def test_the_same_ones_pass_and_on_batches_of_their_own_any(batch, limits):
    assert run_ranks(3, begun, batch, limits) == [""] * 3


# --- errors of one rank ----------------------------------------------------------------------------------------------

STEPS = 6


class Fails:
    """As a module's hook, or as a logits processor: fails when it is called for the `at`th time."""

    def __init__(self, error: Exception, at: int = 2):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, _: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return scores


def continued(ranks: Ranks, layer_fails: Fails | None = None, processor: Any = None) -> Tensor:
    decoder, header = parallel_decoder(whole_decoder("mixtral"), ranks, "distinct")
    if layer_fails:
        decoder.model.layers[1].register_forward_pre_hook(layer_fails)
    with generating(decoder, header, {}) as agree:
        processors = [processor] if processor else []
        ids = torch.tensor([[5, 6, 7]])
        return generate(decoder, ids, agree=agree, max_new_tokens=STEPS, eos_token_id=None, logits_processor=processors)


def left(ranks: Ranks, heard: Path, raises: Callable[[Ranks], object]) -> None:
    """Writes down what this rank raises; rank 1 is then gone, as a script is that does not catch it."""
    try:
        raises(ranks)
    except Exception as error:  # noqa: BLE001  # looked at by the test
        (heard / str(ranks.rank)).write_text("".join(traceback.format_exception(error)))
        if ranks.rank == 1:
            os._exit(9)


def heard_of(raises: Callable[[Ranks], object], heard: Path) -> list[str]:
    with pytest.raises(RuntimeError, match="rank 1 ended"):
        run_ranks(2, left, heard, raises, seconds=10)
    return [(heard / str(rank)).read_text() for rank in range(2)]


def out_of_memory_on_1(ranks: Ranks) -> None:
    continued(ranks, layer_fails=Fails(torch.OutOfMemoryError("a long prompt")) if ranks.rank == 1 else None)


def test_an_error_within_a_step_is_raised_at_once_and_ends_the_others(tmp_path):
    first, second = heard_of(out_of_memory_on_1, tmp_path)
    assert "OutOfMemoryError: a long prompt\nrank 1 of 2: within a step" in second
    assert "RankError" not in second
    assert "RankError: rank 0: within a step: a rank of 2 went away" in first


def refused_on_1(ranks: Ranks) -> Tensor | str:
    if ranks.rank == 0:
        return continued(ranks)
    try:
        return continued(ranks, processor=Fails(ValueError("refused")))
    except ValueError as error:
        return str(error)


def test_an_error_between_steps_leaves_the_others_their_tokens():
    tokens, error = run_ranks(2, refused_on_1)
    assert tokens.shape == (1, 3 + STEPS)
    assert error == "refused"


def refused_on_both(ranks: Ranks) -> None:
    """On rank 0 first, which goes on without tokens; on rank 1 within a step, while rank 0 serves it."""
    if ranks.rank == 0:
        continued(ranks, processor=Fails(ValueError("refused")))
    else:
        continued(ranks, layer_fails=Fails(torch.OutOfMemoryError("a long prompt"), at=4))


def test_an_error_is_not_lost_where_another_rank_then_goes_away(tmp_path):
    first, _ = heard_of(refused_on_both, tmp_path)
    gone, own = first.split("During handling of the above exception")
    assert "by peer" in gone  # in the words of gloo
    assert own.endswith("ValueError: refused\n")
