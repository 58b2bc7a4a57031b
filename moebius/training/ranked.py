"""A rank's part of a step, where experts are spread over ranks.

B sequences a step, T tokens a sequence, N ranks.
"""

import torch
from torch import Tensor

from moebius.distributed.collectives import add
from moebius.distributed.config import Batch
from moebius.distributed.gradients import Gradients
from moebius.distributed.header import checksum
from moebius.distributed.ranks import Ranks
from moebius.distributed.spread import Spread, spread_of
from moebius.errors import ArgumentError
from moebius.layers.decoder import IGNORED_LABEL, Decoder


class _OnRanks:
    def __init__(self, decoder: Decoder, ranks: Ranks, batch: Batch):
        self.speaks, self._ranks = ranks.first, ranks
        self._gradients = Gradients(decoder, ranks, batch)

    def clip(self, max_norm: float) -> Tensor:
        self._gradients.reduce()
        return self._gradients.clip(max_norm)


class SharedBatch(_OnRanks):
    """A rank that computes the whole step, as all of them do, but for its experts."""

    def __init__(self, decoder: Decoder, ranks: Ranks):
        super().__init__(decoder, ranks, "shared")

    def rows(self, input_ids: Tensor) -> Tensor:
        return input_ids

    def part(self, loss: Tensor, labels: Tensor) -> Tensor:
        return loss

    def pooled(self, values: Tensor) -> Tensor:
        return values


class OwnSequences(_OnRanks):
    """A rank that computes its own sequences of a step: a run of the B, one more on the first if they do not divide."""

    def __init__(self, decoder: Decoder, ranks: Ranks):
        super().__init__(decoder, ranks, "distinct")

    def rows(self, input_ids: Tensor) -> Tensor:
        """ArgumentError, on every rank: ranks were given different steps, or fewer sequences than there are ranks."""
        steps = self._ranks.gathered(checksum(input_ids), "comparing the step's batch")
        if other := next((rank for rank, step in enumerate(steps) if step != steps[0]), None):
            raise ArgumentError(
                f"rank {other} was given another batch than rank 0",
                advice="give every rank the whole step's sequences, of which each takes its own",
            )
        parts = self._ranks.size
        if len(input_ids) < parts:
            raise ArgumentError(
                f"a step of {len(input_ids)} sequences leaves some of {parts} ranks without any",
                advice=f"take a batch_size of {parts} or more",
            )
        return input_ids.tensor_split(parts)[self._ranks.rank]

    def part(self, loss: Tensor, labels: Tensor) -> Tensor:
        labelled = (labels[:, 1:] != IGNORED_LABEL).sum().to(loss.device)
        own = torch.where(labelled > 0, loss, torch.zeros_like(loss))  # of no token it is not a number
        return own * (labelled / self.pooled(labelled))

    def pooled(self, values: Tensor) -> Tensor:
        total = add(values.detach().to(self._ranks.device, copy=True), self._ranks.everyone)
        return total.to(values.device)


def share_of(decoder: Decoder) -> SharedBatch | OwnSequences | None:
    """None for a decoder that is this process's alone."""
    match spread_of(decoder):
        case Spread(ranks, "shared"):
            return SharedBatch(decoder, ranks)
        case Spread(ranks):
            return OwnSequences(decoder, ranks)
        case _:
            return None
