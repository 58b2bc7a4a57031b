"""Which part of a step is this process's, and how the parts become one step.

B sequences a step, T tokens a sequence, N ranks, E experts.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.layers.decoder import Decoder


class Share(Protocol):
    """speaks: whether this process tells of the run."""

    speaks: bool

    def rows(self, input_ids: Tensor) -> Tensor:
        """This process's sequences of the step's [B, T]."""
        ...

    def part(self, loss: Tensor, labels: Tensor) -> Tensor:
        """What this process's sequences add to the step's loss: their own, a mean over the labelled tokens of labels
        [B, T] (as Decoder.forward takes them), by how many of all the step's these are.  A scalar; 0 where none is
        labelled here, whatever the loss.
        """
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

    speaks = True

    def __init__(self, decoder: Decoder):
        self._parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]

    def rows(self, input_ids: Tensor) -> Tensor:
        return input_ids

    def part(self, loss: Tensor, labels: Tensor) -> Tensor:
        return loss

    def pooled(self, values: Tensor) -> Tensor:
        return values

    def clip(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)


def share_of(decoder: Decoder) -> Share:
    """As the decoder was loaded: by itself, or with its experts spread over ranks."""
    if not dist.is_initialized():  # what ranks need takes a second to import
        return Whole(decoder)
    from moebius.training import ranked

    return ranked.share_of(decoder) or Whole(decoder)
