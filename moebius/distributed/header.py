"""What ranks tell each other before every step: how many tokens each brings, and which.

N ranks of the job, B batch, T tokens of a rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.distributed.config import Batch
from moebius.distributed.contract import Exchange
from moebius.distributed.expert_parallel import ParallelExperts
from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError, Fault, RankError


class Step(NamedTuple):
    """One rank's part of a step.  tokens: B*T.  checksum: of ids and mask, where all ranks should have the same."""

    tokens: int
    checksum: int
    done: bool


class StepHeader:
    """Before each forward of a Decoder: one all-gather between the hosts, of three numbers a rank.

    `decoder.register_forward_pre_hook(StepHeader(ranks, batch), with_kwargs=True)`: the hook is `__call__`.  With
    batch="shared" it proves that all ranks have the same tokens; with "distinct" it tells the exchanges how many each
    rank brings.  Every rank has to run the forward, a rank that has nothing left with input_ids [0, T].
    done: set it on a rank that has nothing left; all_done: whether every rank had set it at the last step.
    told: set it where rank 0 has just told all ranks the ids of the next step, which then is not announced: in a step
    of few tokens that would take longer than a layer.
    While a CUDA graph is captured nothing is said, and what was said before it holds.
    """

    def __init__(self, ranks: Ranks, batch: Batch):
        self.ranks, self.batch = ranks, batch
        self.done = self.all_done = self.told = False
        self._exchanges: set[Exchange] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """ArgumentError, on every rank: the batch is shared, and ranks have different tokens or masks."""
        input_ids: Tensor = args[0] if args else kwargs["input_ids"]
        mask: Tensor | None = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        known, self.told = self.told, False
        if known or self.ranks.size == 1 or (input_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        shared = self.batch == "shared"
        steps = self._asked(Step(input_ids.numel(), _batch_number(input_ids, mask) if shared else 0, self.done))
        if shared:
            _check_same(steps)
        self.all_done = all(step.done for step in steps)
        ep = self.ranks.grid.ep
        first = self.ranks.rank // ep * ep
        for exchange in self._exchanges_of(module):
            exchange.expect([step.tokens for step in steps[first : first + ep]])

    def _asked(self, step: Step) -> list[Step]:
        own = torch.tensor(step, dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.ranks.size)]
        try:
            dist.all_gather(everyone, own, group=self.ranks.host)
        except RuntimeError as error:  # as torch.distributed words it, some rank is not there
            raise RankError(
                f"rank {self.ranks.rank}: not all of {self.ranks.size} ranks came to this step",
                advice="run every forward on every rank, one without tokens with input_ids of shape [0, T]",
            ) from error
        return [Step(tokens, number, bool(done)) for tokens, number, done in (told.tolist() for told in everyone)]

    def _exchanges_of(self, module: nn.Module) -> set[Exchange]:
        if self._exchanges is None:  # found once: going over all modules takes as long as a launch in every layer
            self._exchanges = {part.exchange for part in module.modules() if isinstance(part, ParallelExperts)}
        return self._exchanges


def checksum(input_ids: Tensor) -> int:
    """A number of 64 bits that tells ids [B, T] from others, and from the same ones in another order or shape.

    Each id is mixed with its place as in SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), and all are added up.
    """
    ids = input_ids.flatten().long()
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    mixed = (ids + 1) * 6364136223846793005 + places * 1442695040888963407
    mixed = (mixed ^ (mixed >> 30)) * 7046029254386353131
    return int((mixed ^ (mixed >> 27)).sum()) ^ input_ids.shape[-1]


def _batch_number(input_ids: Tensor, attention_mask: Tensor | None) -> int:
    """Of ids and mask; a mask of ones is none."""
    if attention_mask is None or bool(attention_mask.all()):
        return checksum(input_ids)
    return checksum(input_ids) ^ (checksum(attention_mask) >> 1)


def _check_same(steps: Sequence[Step]) -> None:
    first = steps[0]
    faults = [
        Fault(f"rank {rank}", *_difference(first, step))
        for rank, step in enumerate(steps)
        if (step.tokens, step.checksum) != (first.tokens, first.checksum)
    ]
    if faults:
        raise ArgumentError(
            'the batch is "shared", and ranks were given other tokens or masks than rank 0',
            faults=faults,
            advice='give every rank the same batch, or each its own with DistributedConfig(batch="distinct")',
        )


def _difference(first: Step, step: Step) -> tuple[str, str]:
    if step.tokens != first.tokens:
        return "length", f"{step.tokens} tokens, rank 0 has {first.tokens}"
    return "input_ids or attention_mask", f"{step.tokens} tokens, not those of rank 0"
