"""Layers that a backward computes again bring the tokens of their own forward, whatever was announced since.

N ranks, B batch, T tokens of a sequence.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebius.distributed.all_to_all import AllToAll
from moebius.distributed.contract import Exchange
from moebius.distributed.exchange import ByTokens
from moebius.distributed.gather_scatter import GatherScatter
from moebius.distributed.ranks import Ranks
from moebius.layers.decoder import Decoder
from tests.distributed.decoders import experts_of, parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks
from tests.distributed.test_expert_parallel import gradient_distances

LENGTHS = [((1, 4), (1, 9)), ((1, 7), (2, 1)), ((0, 3), (1, 5))]
"""[B, T] of each rank's two forwards."""


def computed_again(decoder: Decoder, reentrant: bool) -> None:
    """As transformers' gradient_checkpointing_enable: every layer keeps its inputs alone."""
    for layer in decoder.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)


def two_answers(decoder: Decoder, ids: list[Tensor]) -> None:
    """As for a preferred answer and a rejected one: two forwards, and one backward after them."""
    losses = [decoder(each, output_router_logits=False).logits.sin().sum() for each in ids]
    (losses[0] - 0.5 * losses[1]).backward()


def distances(ranks: Ranks, exchange: type[Exchange], reentrant: bool) -> dict[str, float]:
    whole = whole_decoder("qwen2_moe")
    decoder, _ = parallel_decoder(whole, ranks, "distinct")
    for experts in experts_of(decoder):
        experts.exchange = exchange(ranks.experts, experts.layout)
    computed_again(decoder, reentrant)
    ids = [[ids_of(rank, number) for number in range(2)] for rank in range(ranks.size)]
    for each in ids:
        two_answers(whole, each)
    two_answers(decoder, ids[ranks.rank])
    return gradient_distances(decoder, whole, ranks, "distinct")


def ids_of(rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * rank + number)
    return torch.randint(3, 128, LENGTHS[rank][number], generator=generator)


@pytest.mark.parametrize("exchange", [GatherScatter, ByTokens, AllToAll])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_of_other_lengths_before_a_backward_that_computes_layers_again(exchange, reentrant):
    for found in run_ranks(3, distances, exchange, reentrant, seconds=10):
        assert {name: far for name, far in found.items() if far > 1e-5} == {}
