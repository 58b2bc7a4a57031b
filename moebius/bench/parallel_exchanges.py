"""One layer's exchange by itself, without experts: what bringing rows there and back costs.

N ranks, E experts, K experts a token, T tokens of each rank, R rows that a rank works on, H hidden.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.distributed.config import Batch, DistributedConfig
from moebius.distributed.exchange import EXCHANGES, choose
from moebius.distributed.layout import ExpertLayout
from moebius.distributed.ranks import Ranks, join

CANDIDATES: tuple[tuple[Batch, str], ...] = (
    ("shared", "all_reduce"),
    ("distinct", "gather_scatter"),
    ("distinct", "all_to_all"),
)
FEWER_TOKENS = (8, 1024, 2048, 4096)

TOGETHER = 10  # calls that are timed as one

Timed = Callable[[Callable[[], Any], torch.device, int, int], list[float]]


def exchange_rows(folder: Path, device: str, tokens: int, repeats: int, timed: Timed) -> list[dict[str, Any]]:
    """Every exchange, for `tokens` tokens a rank and some fewer, in bfloat16, experts chosen uniformly.

    seconds: of one, eager, timed so many times.  auto: what "auto" takes for that batch and layer.
    """
    config = json.loads((folder / "config.json").read_text())
    ranks = join(DistributedConfig(enable_expert_parallel=True), config["num_experts"], device_type=device)
    return [
        row | {"seconds": timed(call, ranks.device, repeats, TOGETHER)}
        for count in sorted({*(fewer for fewer in FEWER_TOKENS if fewer < tokens), tokens})
        for row, call in _calls(ranks, config, count)
    ]


def _calls(ranks: Ranks, config: dict[str, Any], tokens: int) -> Iterator[tuple[dict[str, Any], Callable[[], Tensor]]]:
    layout = ExpertLayout(config["num_experts"], ranks.grid.ep)
    rows = _rows(ranks, config, tokens)
    for batch, name in CANDIDATES:
        exchange = EXCHANGES[name](ranks.experts, layout)
        exchange.expect([tokens] * ranks.grid.ep)
        auto = choose(batch, "auto", ranks.grid.ep, config["num_experts_per_tok"], one_node=True).name

        @torch.inference_mode()
        def there_and_back(exchange=exchange) -> Tensor:
            visit = exchange.dispatch(*rows)
            return visit.combine(torch.empty_like(visit.hidden_states))  # as experts do: it may be added to in place

        yield {"batch": batch, "exchange": name, "tokens": tokens, "auto": auto}, there_and_back


def _rows(ranks: Ranks, config: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states [T, H] bfloat16, top_k_index [T, K], top_k_weights [T, K] bfloat16, a rank's own."""
    generator = torch.Generator().manual_seed(ranks.rank)
    hidden_states = torch.randn(tokens, config["hidden_size"], generator=generator).bfloat16()
    scores = torch.rand(tokens, config["num_experts"], generator=generator)
    weights, ids = scores.topk(config["num_experts_per_tok"], dim=1)
    return hidden_states.to(ranks.device), ids.to(ranks.device), weights.bfloat16().to(ranks.device)
