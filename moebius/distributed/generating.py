"""Generation on ranks: on a shared batch one rank decides for all; on distinct ones, who is done goes on taking part.

B rows of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.distributed.header import StepHeader
from moebius.errors import RankError
from moebius.layers.decoder import Decoder

LOST = ("gloo", "pair closure", "Connection closed", "Connection reset")  # gloo's words; it has no kinds of errors


@contextmanager
def generating(decoder: Decoder, header: StepHeader) -> Iterator[Callable[[Tensor], Tensor]]:
    """Around a loop of forwards that every rank runs; gives what makes a decision of this rank, [B], that of all.

    RankError: a rank went away, or did not come in time.  An error of this rank alone lets the others finish, where
    batches are distinct.
    """
    ranks = header.ranks
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
