"""Who has which expert: arithmetic alone.  No torch.

E experts, N ranks that share them.
"""

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
        """The ids that a rank holds, in order."""
        return range(self._first(rank), self._first(rank + 1))

    def _first(self, rank: int) -> int:
        each, more = divmod(self.num_experts, self.ranks)
        return rank * each + min(rank, more)
