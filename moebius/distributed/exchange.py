"""The exchanges by name, and which one "auto" is.

N ranks share one set of experts; T tokens of this rank, M the most of any rank; K experts a token, H hidden.
"""

import functools
import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from moebius.distributed.all_reduce import AllReduce
from moebius.distributed.all_to_all import AllToAll
from moebius.distributed.config import Batch, ExchangeName
from moebius.distributed.contract import Dispatch, Exchange, Visit
from moebius.distributed.gather_scatter import GatherScatter
from moebius.distributed.layout import ExpertLayout
from moebius.experts.select import Choice

FEW_TOKENS = 3072
"""M up to which gathering all rows takes less time than finding out which are needed where; reckoned, not measured."""

logger = logging.getLogger(__name__)


class Local(Exchange):
    """All experts are here."""

    waits = False

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        return Visit(hidden_states, top_k_index, top_k_weights, lambda output: output)


class ByTokens(Exchange):
    """GatherScatter while no rank has more than few_tokens tokens, AllToAll above.  A CUDA graph holds the former."""

    few_tokens = FEW_TOKENS

    def __init__(self, group: dist.ProcessGroup, layout: ExpertLayout):
        super().__init__(group, layout)
        self.few, self.many = GatherScatter(group, layout), AllToAll(group, layout)

    def expect(self, tokens: Sequence[int]) -> None:
        self.few.expect(tokens)

    def begin(self, hidden_states: Tensor) -> Dispatch:
        exchange = self.few if self.few.sizes.longest(hidden_states) <= self.few_tokens else self.many
        return exchange.begin(hidden_states)

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Visit:
        return self.begin(hidden_states)(hidden_states, top_k_index, top_k_weights)


EXCHANGES: Mapping[str, type[Exchange]] = {
    "local": Local,
    "all_reduce": AllReduce,
    "gather_scatter": GatherScatter,
    "all_to_all": AllToAll,
    "by_tokens": ByTokens,
}


def choose(batch: Batch, exchange: ExchangeName, ep: int, top_k: int, one_node: bool) -> Choice:
    """The name of an exchange in EXCHANGES, and why it is this one.

    ep: N.  one_node: whether all N ranks are on one host.
    """
    choice = _choice(batch, exchange, ep, top_k, one_node)
    _log(choice)
    return choice


def _choice(batch: Batch, exchange: ExchangeName, ep: int, top_k: int, one_node: bool) -> Choice:
    if ep == 1:
        return Choice("local", "each rank has all experts")
    if exchange != "auto":
        return Choice(exchange, "it was named")
    if batch == "shared":
        return Choice("all_reduce", "all ranks have the same tokens")
    if not one_node:
        return Choice("all_to_all", f"{ep} ranks on several hosts: the fewest rows travel")
    if ep > top_k:
        return Choice("all_to_all", f"a token visits {top_k} of {ep} ranks at most")
    if 2 * ep <= top_k:
        return Choice("gather_scatter", f"a token with {top_k} experts visits nearly all of {ep} ranks")
    return Choice("by_tokens", f"gather_scatter up to {FEW_TOKENS} tokens a rank, all_to_all above")


@functools.cache
def _log(choice: Choice) -> None:
    """Once a choice: every layer makes the same."""
    logger.info("exchange: %s, %s", *choice)
