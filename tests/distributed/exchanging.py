"""One layer of experts on several ranks beside the same one in one process.

N ranks, E experts, K experts a token, T tokens of a rank, H hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.config import SoftmaxTopK, SparseMoe
from moebius.distributed.exchange import EXCHANGES, ByTokens
from moebius.distributed.expert_parallel import ParallelExperts
from moebius.distributed.layout import ExpertLayout
from moebius.distributed.ranks import Ranks
from moebius.experts.interface import Experts

H = 8
PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class Case:
    """tokens: "balanced", "hot" (all to the last experts) or "idle" (the last rank has none).

    trained: which of "states", "weights", "experts" have gradients.
    """

    exchange: str
    experts: int
    tokens: str = "balanced"
    dtype: torch.dtype = torch.float64
    weights_dtype: torch.dtype = torch.float64
    trained: frozenset[str] = frozenset({"states", "weights", "experts"})
    announced: bool = True

    @property
    def shared(self) -> bool:
        return self.exchange == "all_reduce"

    @property
    def moe(self) -> SparseMoe:
        return SparseMoe(self.experts, min(3, self.experts), 6, SoftmaxTopK(renormalize=False), bias=True)

    def counts(self, ranks: int) -> list[int]:
        """T of each rank."""
        if self.shared:
            return [0 if self.tokens == "idle" else 7] * ranks
        return [0 if self.tokens == "idle" and rank == ranks - 1 else 4 + rank for rank in range(ranks)]


@dataclass
class Inputs:
    states: Tensor
    index: Tensor
    weights: Tensor
    cotangent: Tensor

    def part(self, first: int, count: int) -> "Inputs":
        return Inputs(*(tensor[first : first + count] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in vars(self).values()))


def inputs(case: Case, total: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    top_k = case.moe.top_k
    scores = torch.rand(total, case.experts, generator=generator)
    index = torch.arange(case.experts - top_k, case.experts).expand(total, -1)
    if case.tokens != "hot":
        index = scores.argsort(dim=1)[:, :top_k]
    states, cotangent = (torch.randn(total, H, generator=generator).to(case.dtype) for _ in range(2))
    return Inputs(states, index, torch.rand(total, top_k, generator=generator).to(case.weights_dtype), cotangent)


def whole_experts(case: Case) -> Experts:
    experts = Experts(case.moe, H).to(case.dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def parallel(case: Case, ranks: Ranks, counts: list[int]) -> ParallelExperts:
    exchange = EXCHANGES[case.exchange](ranks.experts, ExpertLayout(case.experts, ranks.size))
    if isinstance(exchange, ByTokens):
        exchange.few_tokens = 5 if case.tokens == "idle" else 100
    if case.announced:
        exchange.expect(counts)
    batch = "shared" if case.shared else "distinct"
    experts = ParallelExperts(case.moe, H, ranks=ranks, batch=batch, exchange=exchange)
    experts.to(ranks.device, case.dtype)
    whole = whole_experts(case)
    with torch.no_grad():
        for name in PARAMETERS:
            experts.get_parameter(name).copy_(whole.get_parameter(name)[experts.held.start : experts.held.stop])
    return experts


def results(case: Case, experts: Experts, given: Inputs) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    states = given.states.clone().requires_grad_("states" in case.trained)
    weights = given.weights.clone().requires_grad_("weights" in case.trained)
    experts.requires_grad_("experts" in case.trained)
    output = experts(states, given.index, weights)
    found = {"output": output.detach()}
    if case.trained:
        (output * given.cotangent).sum().backward()
        leaves = {"states": states, "weights": weights, **dict(experts.named_parameters())}
        found |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found


def distances(ranks: Ranks, cases: list[Case]) -> dict[Case, dict[str, float]]:
    """How far each result is from that of one process, relative to its largest number."""
    return {case: dict(_distances(ranks, case)) for case in cases}


def _distances(ranks: Ranks, case: Case) -> Iterator[tuple[str, float]]:
    counts = case.counts(ranks.size)
    given = inputs(case, counts[0] if case.shared else sum(counts)).to(ranks.device)
    first, count = (0, counts[0]) if case.shared else (sum(counts[: ranks.rank]), counts[ranks.rank])
    experts = parallel(case, ranks, counts)
    found = results(case, experts, given.part(first, count))
    expected = results(case, whole_experts(case).to(ranks.device), given)
    for name in expected.keys() | found.keys():
        mine = (experts.held.start, len(experts.held)) if name in PARAMETERS else (first, count)
        reference = expected[name].narrow(0, *mine)
        assert found[name].dtype == reference.dtype
        scale = expected[name].abs().max().item() if expected[name].numel() else 0.0
        yield name, (found[name] - reference).abs().max().item() / (scale or 1.0) if reference.numel() else 0.0


def cases(ranks: int) -> list[Case]:
    """Divisible and not, one expert fewer than ranks, only one."""
    numbers = sorted({2 * ranks, 2 * ranks + 1, ranks + 1, ranks - 1, 1})
    names = [name for name in EXCHANGES if name != "local"]
    return [
        Case(name, number, tokens) for name in names for number in numbers for tokens in ("balanced", "hot", "idle")
    ]
