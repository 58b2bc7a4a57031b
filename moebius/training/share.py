"""Which part of a step is this process's, and how the parts become one step.

B sequences a step, T tokens a sequence, N ranks, E experts.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.distributed.gradients import Gradients
from moebius.distributed.ranks import Ranks
from moebius.distributed.spread import Spread, spread_of
from moebius.errors import ArgumentError
from moebius.layers.decoder import Decoder


class Share(Protocol):
    """parts: of how many the step's loss is the sum.  speaks: whether this process tells of the run."""

    parts: int
    speaks: bool

    def rows(self, input_ids: Tensor) -> Tensor:
        """This process's sequences of the step's [B, T]."""
        ...

    def pooled(self, values: Tensor) -> Tensor:
        """The sum of all parts' values, without a gradient."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """After the backward: makes gradients those of the whole step, scales them down to a global L2 norm of
        `max_norm` (1211.5063, section 3.2), and gives the norm before.
        """
        ...


class Whole:
    """A process by itself."""

    parts, speaks = 1, True

    def __init__(self, decoder: Decoder):
        self._parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]

    def rows(self, input_ids: Tensor) -> Tensor:
        return input_ids

    def pooled(self, values: Tensor) -> Tensor:
        return values

    def clip(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)


class SharedBatch:
    """A rank that computes the whole step, as all of them do, but for its experts."""

    parts = 1

    def __init__(self, decoder: Decoder, ranks: Ranks):
        self.speaks = ranks.first
        self._gradients = Gradients(decoder, ranks, "shared")

    def rows(self, input_ids: Tensor) -> Tensor:
        return input_ids

    def pooled(self, values: Tensor) -> Tensor:
        return values

    def clip(self, max_norm: float) -> Tensor:
        self._gradients.reduce()
        return self._gradients.clip(max_norm)


class OwnSequences:
    """A rank that computes its own sequences of a step: a run of the B, one more on the first if they do not divide."""

    def __init__(self, decoder: Decoder, ranks: Ranks):
        self.parts, self.speaks, self._ranks = ranks.size, ranks.first, ranks
        self._gradients = Gradients(decoder, ranks, "distinct")

    def rows(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) < self.parts:
            raise ArgumentError(
                f"a step of {len(input_ids)} sequences leaves some of {self.parts} ranks without any",
                advice=f"take a batch_size of {self.parts} or more",
            )
        return input_ids.tensor_split(self.parts)[self._ranks.rank]

    def pooled(self, values: Tensor) -> Tensor:
        total = values.detach().to(self._ranks.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def clip(self, max_norm: float) -> Tensor:
        self._gradients.reduce()
        return self._gradients.clip(max_norm)


def share_of(decoder: Decoder) -> Share:
    """As the decoder was loaded: by itself, or with its experts spread over ranks."""
    match spread_of(decoder):
        case None:
            return Whole(decoder)
        case Spread(ranks, "shared"):
            return SharedBatch(decoder, ranks)
        case Spread(ranks):
            return OwnSequences(decoder, ranks)
