"""How often each expert was chosen: counted where the router chooses, so that it holds for every kind of routing.

L MoE layers, E experts, T tokens, K experts a token.
"""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from moebius.layers.decoder import Decoder
from moebius.layers.router import Router, RouterChoice


class RoutingCounts:
    """Counts the router's choices of every forward in its `with` block.

        with RoutingCounts(decoder) as counts:
            decoder(input_ids)
        counts.table()      # [L, E] int64: row l, column e: tokens that MoE layer l sent to expert e

    The counters stay on the routers' device; only `table` waits for them.  They are of this process's tokens.
    """

    def __init__(self, decoder: Decoder):
        self._routers = [module for module in decoder.modules() if isinstance(module, Router)]
        self._experts = [layer.num_experts for layer in decoder.config.moe_layers]
        self._counts: list[Tensor | None] = [None] * len(self._routers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles = [
            router.register_forward_hook(self._counter(layer)) for layer, router in enumerate(self._routers)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def table(self) -> Tensor:
        """[L, E] int64 on the CPU, where E is the widest layer's; zero where nothing was counted."""
        table = torch.zeros(len(self._experts), max(self._experts, default=0), dtype=torch.int64)
        for layer, counts in enumerate(self._counts):
            if counts is not None:
                table[layer, : self._experts[layer]] = counts.cpu()
        return table

    def _counter(self, layer: int):
        def count(router: nn.Module, inputs: object, choice: RouterChoice) -> None:
            chosen = torch.bincount(choice.top_k_index.flatten(), minlength=self._experts[layer])
            previous = self._counts[layer]
            self._counts[layer] = chosen if previous is None else previous + chosen

        return count
