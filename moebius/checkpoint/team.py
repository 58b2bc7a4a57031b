"""The processes that save one model together, as far as files see them.  No torch.

checkpoint/ knows no process groups; whoever has them brings something that is a Team.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

T = TypeVar("T")


class Team(Protocol):
    """All of its methods are called by every process, in the same order; `what` is for their errors."""

    @property
    def rank(self) -> int:
        """Which of the processes this one is, from 0."""
        ...

    @property
    def size(self) -> int: ...

    def told(self, value: T, what: str) -> T:
        """The value of rank 0."""
        ...

    def gathered(self, value: T, what: str) -> Sequence[T]:
        """Every rank's value, by rank."""
        ...

    def meet(self, what: str, seconds: float) -> None:
        """Ends when every process is here.  RankError: one is not within the seconds."""
        ...

    def together(self, what: str) -> AbstractContextManager[None]:
        """A step that fails on all processes if it fails on one, with the same error."""
        ...


class Alone:
    """A Team of one; see Team."""

    rank, size = 0, 1

    def told(self, value: T, what: str) -> T:
        return value

    def gathered(self, value: T, what: str) -> Sequence[T]:
        return [value]

    def meet(self, what: str, seconds: float) -> None:
        pass

    def together(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()
