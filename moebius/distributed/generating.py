"""Generation on ranks: on a shared batch one rank decides for all; on distinct ones, who is done goes on taking part.

B rows of a batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.distributed.header import StepHeader
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError, Fault, RankError
from moebius.layers.decoder import Decoder

LOST = ("gloo", "pair closure", "Connection closed", "Connection reset")  # gloo's words; it has no kinds of errors


@contextmanager
def generating(
    decoder: Decoder, header: StepHeader, settings: Mapping[str, Any]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Around a loop of forwards that every rank runs; gives what makes a decision of this rank, [B], that of all.

    settings: how long the loop goes on, and the like.  ArgumentError, on every rank: the batch is shared, and settings
    are not.  RankError: a rank went away, or did not come in time.  An error of this rank alone lets the others finish,
    where batches are distinct.
    """
    ranks = header.ranks
    if header.batch == "shared":
        _check_same(ranks, settings)
    try:
        yield (lambda decided: _as_rank_0(decided, header)) if header.batch == "shared" else _own
    except RankError:
        raise
    except Exception as error:
        if not _lost(error):  # but of this rank alone
            _take_part(decoder, header)
            raise
        reason = str(error).splitlines()[0].partition(". This is")[0]  # beyond it gloo gives advice of its own
        raise RankError(
            f"rank {ranks.rank}: generating: a rank of {ranks.size} went away, or did not come in time ({reason})",
            advice="look at what the other ranks said first; generate must be called on every rank",
        ) from error
    else:
        _take_part(decoder, header)
    finally:
        header.told = False


def _check_same(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Ranks that stop at different steps would wait for one another."""
    first, *others = ranks.gathered(dict(settings), "generating")
    faults = [
        Fault(f"rank {rank}", name, f"{theirs.get(name)!r}, rank 0 has {first.get(name)!r}")
        for rank, theirs in enumerate(others, 1)
        for name in first | theirs
        if theirs.get(name) != first.get(name)
    ]
    if faults:
        raise ArgumentError("generate was called with other settings than on rank 0", faults=faults)


def _own(decided: Tensor) -> Tensor:
    return decided


def _as_rank_0(decided: Tensor, header: StepHeader) -> Tensor:
    """Equal logits on all ranks would choose equally; what is sampled, or differs in a last bit, might not."""
    decided = decided.contiguous()
    dist.broadcast(decided, src=0)
    header.told = True
    return decided


@torch.no_grad()
def _take_part(decoder: Decoder, header: StepHeader) -> None:
    """Runs forwards without a token until every rank is done: experts here are still visited by tokens from there."""
    if header.batch == "shared" or header.ranks.size == 1:
        return
    device = decoder.model.embed_tokens.weight.device
    header.done, header.all_done = True, False
    try:
        while not header.all_done:
            decoder(torch.empty(0, 1, dtype=torch.int64, device=device))
    finally:
        header.done = False


def _lost(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
