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
from moebius.distributed.roll_call import is_lost, lost
from moebius.errors import RankError
from moebius.layers.decoder import Decoder


@contextmanager
def generating(
    decoder: Decoder, header: StepHeader, settings: Mapping[str, Any]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Around a loop of forwards that every rank runs; gives what makes a decision of this rank, [B], that of all.

    settings: how long the loop goes on, and the like; of the same names on every rank.  ArgumentError, on every rank:
    the batch is shared, and settings are not.  RankError: a rank went away, or did not come in time.  Where batches are
    distinct, an error of this rank between its forwards lets the others finish; within one they wait for it, and only
    its end can end them.
    """
    ranks, forwards = header.ranks, Forwards()
    if header.batch == "shared":
        ranks.roll_call.check_same(settings, "generate")
    with decoder.register_forward_pre_hook(forwards.begin), decoder.register_forward_hook(forwards.end):
        try:
            yield (lambda decided: _as_rank_0(decided, header)) if header.batch == "shared" else _own
            _take_part(decoder, header)
        except RankError:
            raise
        except Exception as error:
            if is_lost(error):
                raise lost(f"rank {ranks.rank}: generating", ranks.size, error) from error
            if forwards.under_way:
                error.add_note(f"rank {ranks.rank} of {ranks.size}: within a step, which no rank can end without it")
            else:
                _take_part_after(error, decoder, header)
            raise
        finally:
            header.told = False


class Forwards:
    """under_way: whether a forward has begun, its step being announced, and has not ended."""

    under_way = False

    def begin(self, *_: object) -> None:
        self.under_way = True

    def end(self, *_: object) -> None:
        self.under_way = False


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


def _take_part_after(error: Exception, decoder: Decoder, header: StepHeader) -> None:
    """Whatever becomes of the others, this rank's own error is the one to raise."""
    try:
        _take_part(decoder, header)
    except Exception:  # noqa: BLE001  # it becomes the first one's context
        raise error  # noqa: B904
