"""Routing counts: what the routers chose, inside the block only."""

import torch

from moebius.training.routing import RoutingCounts


def test_counts_are_those_of_the_router_logits(decoder):
    input_ids = torch.arange(40).view(2, 20)
    with RoutingCounts(decoder) as counts:
        output = decoder(input_ids, output_router_logits=True)
    expected = [
        torch.bincount(logits.topk(2).indices.flatten(), minlength=4).tolist() for logits in output.router_logits
    ]
    assert counts.table().tolist() == expected


def test_forwards_add_up_and_those_outside_the_block_do_not_count(decoder):
    input_ids = torch.arange(10)[None]
    decoder(input_ids)
    with RoutingCounts(decoder) as counts:
        decoder(input_ids)
        once = counts.table()
        decoder(input_ids)
    decoder(input_ids)
    assert torch.equal(counts.table(), 2 * once)
    assert once.sum(dim=1).tolist() == [20, 20]


def test_nothing_counted_is_a_table_of_zeros(decoder):
    with RoutingCounts(decoder) as counts:
        pass
    assert counts.table().tolist() == [[0] * 4] * 2
