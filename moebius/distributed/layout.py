"""Who has which expert: arithmetic alone.  No torch.

E experts, N ranks that share them.
"""

from bisect import bisect_right
from dataclasses import dataclass

from moebius.errors import ArgumentError


@dataclass(frozen=True)
class ExpertLayout:
    """E experts in N runs: with q, m = divmod(E, N) the first m ranks hold q + 1 each, the others q.

    So no rank is without an expert while E >= N.  ArgumentError: no rank, or less than no expert.
    """

    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        if self.num_experts < 0 or self.ranks < 1:
            raise ArgumentError(f"{self.num_experts} experts cannot be shared by {self.ranks} ranks")

    def experts_of(self, rank: int) -> range:
        """The ids that a rank holds, in order; its slots are 0, 1, ... of them."""
        return range(self._first(rank), self._first(rank + 1))

    def owner(self, expert: int) -> int:
        """The rank that holds an expert."""
        return bisect_right(range(1, self.ranks), expert, key=self._first)

    def slots(self, rank: int) -> tuple[int, ...]:
        """id -> slot on the rank, of all E ids; the number of its experts where it does not hold the id."""
        mine = self.experts_of(rank)
        return tuple(expert - mine.start if expert in mine else len(mine) for expert in range(self.num_experts))

    def owners(self) -> tuple[int, ...]:
        """id -> rank, of all E ids."""
        return tuple(rank for rank in range(self.ranks) for _ in self.experts_of(rank))

    def _first(self, rank: int) -> int:
        each, more = divmod(self.num_experts, self.ranks)
        return rank * each + min(rank, more)
