"""Copies of weights in the layouts that torch's CPU operators read, made once and kept beside the weights.

E experts; a source is [E, rows, columns].
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Copy = TypeVar("Copy")
SAMPLED = 16  # numbers of each expert; they lie together, so that a look at them costs one miss of the cache


class PackedCopies(Generic[Copy]):
    """A copy an expert, made when it is first asked for; all are dropped once a source has changed."""

    def __init__(self) -> None:
        self._copies: dict[int, Copy] = {}
        self._sources: list[_Fingerprint] = []

    def follow(self, sources: Sequence[Tensor], experts: Tensor) -> None:
        """What the next copies are made of, and which experts' are wanted next, int64; to be called each time that a
        source may have been written to.
        """
        known = len(sources) == len(self._sources)
        if not known or not all(map(_Fingerprint.shows, self._sources, sources, repeat(experts))):
            self._copies.clear()
            self._sources = [_Fingerprint(_place(source), _sample(source).clone()) for source in sources]

    def of(self, expert: int, make: Callable[[], Copy]) -> Copy:
        if expert not in self._copies:
            self._copies[expert] = make()
        return self._copies[expert]


class _Fingerprint(NamedTuple):
    """Where a tensor lay, how often it had been written to, and some of its bits: a write through `.data`, or in
    inference mode, is not counted.
    """

    place: tuple[object, ...]
    sample: Tensor

    def shows(self, source: Tensor, experts: Tensor) -> bool:
        """Whether `source` is as it was, as far as these experts go."""
        return self.place == _place(source) and torch.equal(
            _bits(_sample(source).index_select(0, experts)), _bits(self.sample.index_select(0, experts))
        )


def _place(source: Tensor) -> tuple[object, ...]:
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.shape, source.stride()


def _sample(source: Tensor) -> Tensor:
    return source.detach()[:, source.shape[1] // 2, :SAMPLED]


def _bits(sample: Tensor) -> Tensor:
    """By which NaN is equal to itself."""
    return sample.contiguous().view(torch.uint8)
