"""What ranks tell each other before every step: how many tokens each brings, and which.

N ranks of the job, B batch, T tokens of a rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.distributed.config import Batch
from moebius.distributed.contract import Exchange
from moebius.distributed.expert_parallel import ParallelExperts
from moebius.distributed.ranks import Ranks
from moebius.distributed.roll_call import Place
from moebius.errors import ArgumentError, Fault
from moebius.layers.decoder import Decoder

POSITIONAL = ("input_ids", "attention_mask", "labels")
TENSORS = (*POSITIONAL, "position_ids")
COMPARED = (*TENSORS, "cache", "output_router_logits")
"""The arguments of Decoder.forward that change what is computed: hidden states, or a loss."""

ARRIVING = "before a forward, which every rank runs, one without tokens with input_ids [0, T]"


class Step(NamedTuple):
    """One rank's part of a step.  tokens: B*T.  given: a number for each of COMPARED, if ranks should have the same."""

    tokens: int
    done: bool
    given: Sequence[int]


class StepHeader:
    """Before each forward of a Decoder: one all-gather between the hosts, of a few numbers a rank.

    `decoder.register_forward_pre_hook(StepHeader(ranks, batch), with_kwargs=True)`: the hook is `__call__`.  With
    batch="shared" it proves that all ranks have the same tokens, masks, labels and positions behind as many in the
    cache (what a cache holds it does not look at); with "distinct" it tells the exchanges how many tokens each rank
    brings.  Every rank has to run the forward, a rank that has nothing left with input_ids [0, T].
    done: set it on a rank that has nothing left; all_done: whether every rank had set it at the last step.
    told: set it where rank 0 has just told all ranks the ids of the next step, which then is not announced: in a step
    of few tokens that would take longer than a layer.
    While a CUDA graph is captured nothing is said, and what was said before it holds.
    """

    def __init__(self, ranks: Ranks, batch: Batch):
        self.ranks, self.batch = ranks, batch
        self.done = self.all_done = self.told = False
        self._exchanges: set[Exchange] | None = None

    def __call__(self, decoder: Decoder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """ArgumentError, on every rank: the batch is shared, and ranks were given different arguments.  RankError: some
        rank is elsewhere, or did not come in time.
        """
        given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        if "input_ids" not in given:
            return  # the decoder, which takes nothing else, says so
        input_ids: Tensor = given["input_ids"]
        known, self.told = self.told, False
        if known or self.ranks.size == 1 or (input_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        shared = self.batch == "shared"
        numbers = numbers_of(decoder, given) if shared else [0] * len(COMPARED)
        steps = self._asked(Step(input_ids.numel(), self.done, numbers))
        if shared:
            _check_same(steps)
        self.all_done = all(step.done for step in steps)
        ep = self.ranks.grid.ep
        first = self.ranks.rank // ep * ep
        for exchange in self._exchanges_of(decoder):
            exchange.expect([step.tokens for step in steps[first : first + ep]])

    def _asked(self, step: Step) -> list[Step]:
        answers = self.ranks.roll_call.answers(Place.FORWARD, ARRIVING, [step.tokens, step.done, *step.given])
        return [Step(tokens, bool(done), given) for tokens, done, *given in (answer.numbers for answer in answers)]

    def _exchanges_of(self, decoder: Decoder) -> set[Exchange]:
        if self._exchanges is None:  # found once: going over all modules takes as long as a launch in every layer
            self._exchanges = {part.exchange for part in decoder.modules() if isinstance(part, ParallelExperts)}
        return self._exchanges


def numbers_of(decoder: Decoder, given: Mapping[str, Any]) -> list[int]:
    """A number for each of COMPARED, 0 for what is not given; the device is waited for once."""
    tensors = {name: given[name] for name in TENSORS if given.get(name) is not None}
    device = given["input_ids"].device
    on_device = torch.stack([_number(name, each).to(device) for name, each in tensors.items()])
    numbers = dict(zip(tensors, on_device.tolist(), strict=True))
    cache, wanted = given.get("cache"), given.get("output_router_logits")
    if "labels" in tensors:  # else it changes no loss, and a rank may look at it alone
        numbers["output_router_logits"] = int(decoder.config.output_router_logits if wanted is None else wanted)
    numbers["cache"] = 0 if cache is None else cache.length
    return [numbers.get(name, 0) for name in COMPARED]


def _number(name: str, tensor: Tensor) -> Tensor:
    """A mask of ones is none."""
    return _mixed(tensor) * (tensor == 0).any() if name == "attention_mask" else _mixed(tensor)


def checksum(input_ids: Tensor) -> int:
    """A number of 64 bits that tells ids [B, T] from others, and from the same ones in another order or shape."""
    return int(_mixed(input_ids))


def _mixed(input_ids: Tensor) -> Tensor:
    """The checksum, [] int64, not read yet.

    Each id is mixed with its place as in SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), and all are added up.
    """
    ids = input_ids.flatten().long()
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    mixed = (ids + 1) * 6364136223846793005 + places * 1442695040888963407
    mixed = (mixed ^ (mixed >> 30)) * 7046029254386353131
    return (mixed ^ (mixed >> 27)).sum() ^ input_ids.shape[-1]


def _check_same(steps: Sequence[Step]) -> None:
    first = steps[0]
    faults = [
        Fault(f"rank {rank}", *_difference(first, step))
        for rank, step in enumerate(steps)
        if (step.tokens, step.given) != (first.tokens, first.given)
    ]
    if faults:
        raise ArgumentError(
            'the batch is "shared", and ranks were given something else than rank 0',
            faults=faults,
            advice='give every rank the same batch, or each its own with DistributedConfig(batch="distinct")',
        )


def _difference(first: Step, step: Step) -> tuple[str, str]:
    if step.tokens != first.tokens:
        return "length", f"{step.tokens} tokens, rank 0 has {first.tokens}"
    pairs = zip(COMPARED, step.given, first.given, strict=True)
    return ", ".join(name for name, its, of_0 in pairs if its != of_0), "not as on rank 0"
