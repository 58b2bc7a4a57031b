"""What an exchange is: how tokens reach their experts on other ranks, and how what these give comes back.

N ranks share one set of E experts; T tokens of this rank, R rows that it works on; K experts a token, H hidden.

Whatever way they go, rows come with their K (id, weight) pairs, ids counted over all E: who works on a row leaves out
what is not its own.  A token that has three experts on a rank travels there once, and is never routed again: a near-tie
decided differently on two ranks would lose it.

Each way is one autograd.Function there and one back, for states and weights together, and the one back is given an
element of the one there.  So both run their backward on every rank, with its collectives, even on one that has no
expert: a rank left out of a collective holds up all the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from moebius.distributed.layout import ExpertLayout


class Visit(NamedTuple):
    """What a rank is to work on, and the way back.

    hidden_states [R, H], top_k_index [R, K] int64, top_k_weights [R, K].
    combine: the sums [R, H] over a rank's own experts -> [T, H], those of this rank's tokens over all experts.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    combine: Callable[[Tensor], Tensor]


Dispatch = Callable[[Tensor, Tensor, Tensor], Visit]


class Exchange(ABC):
    """One way of bringing tokens to experts.  Every rank of the group calls it, in the same order, even with T = 0.

    waits: whether it waits for other ranks.
    """

    waits: bool = True

    def __init__(self, group: dist.ProcessGroup, layout: ExpertLayout):
        self.group, self.layout = group, layout

    def expect(self, tokens: Sequence[int]) -> None:  # noqa: B027  # most need not know
        """Told before a step how many tokens each rank of the group brings to every layer of its forward.

        Not of a layer that a backward computes again: it may be of a step before this one.
        """

    def begin(self, hidden_states: Tensor) -> Dispatch:
        """What `dispatch` is then called by, with the same states: what needs these alone is under way until then."""
        return self.dispatch

    @abstractmethod
    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> Visit."""
