"""Around generation on ranks: what would have them wait for one another without end is said before it begins."""

import pytest

from moebius.distributed.config import Batch
from moebius.distributed.generating import generating
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError
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
    assert (
        said == ["generate was called with other settings than on rank 0: rank 2: max_new_tokens: 9, rank 0 has 8"] * 3
    )


@pytest.mark.parametrize(("batch", "limits"), [("shared", [8, 8, 8]), ("distinct", [8, 4, 9])])
def test_the_same_ones_pass_and_on_batches_of_their_own_any(batch, limits):
    assert run_ranks(3, begun, batch, limits) == [""] * 3
