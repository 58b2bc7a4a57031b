"""How ranks find out that all are at the same place: each says where it is, and what it brings there.

Whatever ranks ask one another on the host begins with this one call, so that two that have lost step find out, both.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moebius import errors
from moebius.errors import ArgumentError, Fault, MoebiusError, RankError

NUMBERS = 8
"""That a rank can say at once, without bytes after them."""
LOST = ("gloo", "pair closure", "Connection closed", "Connection reset")  # gloo's words; it has no kinds of errors
T = TypeVar("T")
ADVICE = "look at what the other ranks said first; a step that all share must be called on every rank"


class Place(IntEnum):
    """Where ranks meet."""

    FORWARD = 0
    VALUES = 1
    END = 2


NAMES = {Place.FORWARD: "a forward", Place.VALUES: "another step", Place.END: "the end of a step"}


class Answer(NamedTuple):
    """One rank's.  numbers: NUMBERS of them.  content: what was pickled for it; None where nothing was."""

    place: int
    numbers: Sequence[int]
    content: object


class RollCall:
    """The ranks of a gloo group of all ranks.

    apart: the error of the last call at which ranks were at different places; all of them have it then.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.apart: Exception | None = None

    def answers(self, place: Place, what: str, numbers: Sequence[int] = (), content: object = None) -> list[Answer]:
        """Every rank's, in their order; what: for errors.  RankError: a rank is elsewhere, or did not answer in time.

        Where one elsewhere has come to the end of its step with an error, it is that error.
        """
        own = b"" if content is None else pickle.dumps(content)
        numbers = [*numbers, *[0] * (NUMBERS - len(numbers))]
        heads = self._gathered(torch.tensor([place, len(own), *numbers], device="cpu"), what)
        contents = self._contents(own, [head[1] for head in heads], what)
        found = [Answer(head[0], head[2:], each) for head, each in zip(heads, contents, strict=True)]
        self._check(place, found, what)
        return found

    def gathered(self, value: T, what: str) -> list[T]:
        """Every rank's value.  RankError: as `answers`."""
        return [cast(T, answer.content) for answer in self.answers(Place.VALUES, what, content=value)]

    def check_same(self, settings: Mapping[str, Any], what: str) -> None:
        """ArgumentError, on every rank: one has other settings than rank 0, by the same names."""
        first, *others = self.gathered(settings, what)
        faults = [
            Fault(f"rank {rank}", name, f"{theirs[name]!r}, rank 0 has {first[name]!r}")
            for rank, theirs in enumerate(others, 1)
            for name in first
            if theirs[name] != first[name]
        ]
        if faults:
            raise ArgumentError(f"{what}: ranks were given different settings", faults=faults)

    def _contents(self, own: bytes, lengths: Sequence[int], what: str) -> list[object]:
        if not any(lengths):
            return [None] * self.size
        padded = torch.asarray(bytearray(own.ljust(max(lengths), b"\0")), dtype=torch.uint8, device="cpu")
        found = self._gathered(padded, what)
        pickled = (bytes(each[:length]) for each, length in zip(found, lengths, strict=True))
        return [pickle.loads(each) if each else None for each in pickled]

    def _gathered(self, own: Tensor, what: str) -> list[list[int]]:
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(everyone, own, group=self.group)
        except RuntimeError as error:
            raise lost(f"rank {self.rank}: {what}", self.size, error) from error
        return [each.tolist() for each in everyone]

    def _check(self, place: Place, found: Sequence[Answer], what: str) -> None:
        """All ranks have the same answers, so that all find out."""
        elsewhere = [(rank, answer) for rank, answer in enumerate(found) if answer.place != place]
        if not elsewhere:
            return
        rank, answer = max(elsewhere, key=lambda other: isinstance(other[1].content, Written))
        apart = RankError(f"rank {self.rank}: {what}: rank {rank} is at {NAMES[Place(answer.place)]}", advice=ADVICE)
        self.apart = read(rank, answer.content) if isinstance(answer.content, Written) else apart
        raise self.apart


def is_lost(error: Exception) -> bool:
    """Whether that is how torch.distributed says that ranks are not there."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)


def lost(what: str, size: int, error: Exception) -> RankError:
    """That error as one of ours."""
    reason = str(error).splitlines()[0].partition(". This is")[0]  # beyond it gloo gives advice of its own
    reason = re.sub(r"\[/\S+\] ", "", reason)[:300]  # and before it, a place in its source
    return RankError(f"{what}: a rank of {size} went away, or did not come in time ({reason})", advice=ADVICE)


class Written(NamedTuple):
    """An error, for other ranks to read."""

    kind: str
    message: str
    faults: Sequence[Fault]
    advice: str


def written(error: Exception) -> Written:
    if isinstance(error, MoebiusError):
        return Written(type(error).__name__, error.message, tuple(error.faults), error.advice)
    return Written(RankError.__name__, f"{type(error).__name__}: {error}", (), "")


def read(rank: int, found: Written) -> MoebiusError:
    """Another rank's error, of the same kind where it is one of ours."""
    kind = getattr(errors, found.kind, RankError)
    return kind(f"rank {rank}: {found.message}", faults=found.faults, advice=found.advice)
