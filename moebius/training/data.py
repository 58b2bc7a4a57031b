"""Token windows for training, as pure functions of (seed, step): a run's place in its data is one integer.

N tokens in the text, B sequences a step, T tokens a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import InputError


@dataclass(frozen=True)
class TokenWindows:
    """Windows of T tokens cut from one long text.

    An epoch cuts the text at a random phase into windows that do not overlap and visits them in random order; both are
    drawn from (seed, epoch). So every epoch sees all tokens but a ragged end, cut differently each time.

    tokens: [N] int64.  Raises InputError if the text is shorter than a window at every phase (N < 2 * seq_len - 1).
    """

    tokens: Tensor
    batch_size: int
    seq_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(
                f"the text has {self.tokens.numel()} tokens; windows of {self.seq_len} need {2 * self.seq_len - 1}",
                advice="give more text, or a smaller seq_len",
            )

    @property
    def windows(self) -> int:
        """Windows an epoch: as many as fit at every phase."""
        return (self.tokens.numel() - self.seq_len + 1) // self.seq_len

    def batch(self, step: int) -> Tensor:
        """input_ids [B, T] int64 of a step (0-based); the labels are the same ids, for the loss shifts them."""
        first = step * self.batch_size
        return torch.stack([self._window(sample) for sample in range(first, first + self.batch_size)])

    def _window(self, sample: int) -> Tensor:
        epoch, place = divmod(sample, self.windows)
        phase, order = self._epoch(epoch)
        start = phase + int(order[place]) * self.seq_len
        return self.tokens[start : start + self.seq_len]

    def _epoch(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        phase = int(torch.randint(self.seq_len, (1,), generator=generator))
        return phase, torch.randperm(self.windows, generator=generator)
