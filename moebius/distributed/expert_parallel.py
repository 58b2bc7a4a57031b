"""Expert parallelism: each rank holds a share of every layer's experts, and tokens visit them.

E experts of a layer, E_local of them this rank's; T tokens of this rank; K experts a token, H hidden.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

from torch import Tensor

from moebius.config import SparseMoe
from moebius.distributed.config import Batch, DistributedConfig
from moebius.distributed.contract import Dispatch, Exchange, Visit
from moebius.distributed.exchange import EXCHANGES, choose
from moebius.distributed.layout import ExpertLayout
from moebius.distributed.ranks import Ranks
from moebius.experts.interface import AUTO, Experts


@dataclass(frozen=True)
class GroupedGemmParallel:
    """The sharding: of every tensor that has the experts first (weights, biases, scales), this rank has a run."""

    layout: ExpertLayout
    place: int

    @property
    def held(self) -> range:
        """This rank's experts, by their ids."""
        return self.layout.experts_of(self.place)

    def local(self, config: SparseMoe) -> SparseMoe:
        """The same layer with this rank's experts alone."""
        return replace(config, num_experts=len(self.held))


@dataclass(frozen=True)
class RouterParallel:
    """The routing: which slot an expert has on this rank."""

    layout: ExpertLayout
    place: int

    def slots(self, top_k_index: Tensor) -> Tensor:
        """Ids over all E -> slots; those of other ranks' experts fall outside [0, E_local), each keeps its weight."""
        return top_k_index - self.layout.experts_of(self.place).start


class ParallelExperts(Experts):
    """The routed experts of one layer, of which this rank holds some; called as Experts is, with ids over all E.

    Its parameters are Experts', [E_local, ...], plain tensors: of the `layout`, the `held` ids in order.  Every rank
    calls it in the same order, and its backward runs on every rank, even on one that has no tokens, or no experts.
    """

    def __init__(
        self,
        config: SparseMoe,
        hidden_size: int,
        *,
        ranks: Ranks,
        batch: Batch,
        exchange: Exchange,
        experts_implementation: str = AUTO,
    ) -> None:
        sharding = GroupedGemmParallel(exchange.layout, ranks.place)
        super().__init__(sharding.local(config), hidden_size, experts_implementation=experts_implementation)
        self.batch: Batch = batch
        self.ranks, self.exchange, self.waits = ranks, exchange, exchange.waits
        self.layout, self.held = exchange.layout, sharding.held
        self.num_routed = config.num_experts
        self.router = RouterParallel(exchange.layout, ranks.place)

    def begin(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self, hidden_states, dispatch=self.exchange.begin(hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        dispatch: Dispatch | None = None,
    ) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64 in [0, E), top_k_weights [T, K] -> [T, H].

        dispatch: that of these states, if the exchange has begun.
        """
        visit = (dispatch or self.exchange.dispatch)(hidden_states, top_k_index, top_k_weights)
        return visit.combine(self._own(visit) if self.num_experts else self._nothing(visit))

    def _own(self, visit: Visit) -> Tensor:
        slots = self.router.slots(visit.top_k_index)
        return super().forward(visit.hidden_states, slots, visit.top_k_weights)

    def _nothing(self, visit: Visit) -> Tensor:
        """Of no experts; joined to the graph by them, as the outputs on other ranks are."""
        output = visit.hidden_states.new_zeros(visit.hidden_states.shape)
        return output + sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)


def parallel_experts(ranks: Ranks, config: DistributedConfig) -> Callable[..., ParallelExperts]:
    """An `experts_class` for Decoder.  Every rank calls this; layers of one kind share an exchange."""
    ep = ranks.grid.ep
    hosts = ranks.gathered(socket.gethostname(), "which host each rank is on")
    one_node = all(len(set(hosts[first : first + ep])) == 1 for first in range(0, ranks.size, ep))

    @cache
    def exchange(layout: ExpertLayout, top_k: int) -> Exchange:
        name = choose(config.batch, config.exchange, ep, top_k, one_node).name
        return EXCHANGES[name](ranks.experts, layout)

    def make(moe: SparseMoe, hidden_size: int, *, experts_implementation: str = AUTO) -> ParallelExperts:
        return ParallelExperts(
            moe,
            hidden_size,
            ranks=ranks,
            batch=config.batch,
            exchange=exchange(ExpertLayout(moe.num_experts, ep), moe.top_k),
            experts_implementation=experts_implementation,
        )

    return make
