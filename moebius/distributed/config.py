"""How a model is spread over ranks, as data.  No torch.

N ranks; ep of them share one set of experts, N / ep sets are copies of one another; E experts a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from moebius.errors import ArgumentError, Fault

Batch = Literal["shared", "distinct"]
ExchangeName = Literal["auto", "all_reduce", "gather_scatter", "all_to_all"]


class Grid(NamedTuple):
    """The ranks as a box, the last axis running fastest: rank = (replica * efsdp + copy) * ep + place.

    replicate * efsdp ranks hold the same experts; the efsdp of one replica keep a shard each of them.  fsdp: ranks that
    keep a shard each of everything else, 1 where each holds it whole.
    """

    replicate: int
    efsdp: int
    ep: int
    fsdp: int

    @property
    def ranks(self) -> int:
        return self.replicate * self.efsdp * self.ep

    def place(self, rank: int) -> int:
        """Which share of the experts a rank has."""
        return rank % self.ep


@dataclass(frozen=True)
class DistributedConfig:
    """How experts, batches and states are spread over the ranks of a job that torchrun started.

    enable_expert_parallel: each rank holds a share of every layer's experts.  ep_size: over how many ranks; default:
    all of them, or, if a layer has fewer experts, the largest divisor of their number that is no larger.  With an
    ep_size the flag may be left out.
    batch: "shared": every rank is given the same tokens, and computes the same but for its experts (generation, few
    tokens); "distinct": each rank is given its own (training, prefill); checked in every forward.
    exchange: how tokens reach their experts, "auto" by the batch and the ranks (`exchange.choose`).
    fsdp_size: ranks over which FSDP2 shards everything but the experts, for training; 1: not at all.  Experts are
    sharded over fsdp_size / ep_size.  dp_replicate_size: copies of such a set; default: as many as there are.
    timeout_seconds: after which a collective that some rank does not join ends the job.

    Raises ArgumentError that lists every field out of range.
    """

    enable_expert_parallel: bool = False
    ep_size: int | None = None
    fsdp_size: int = 1
    dp_replicate_size: int | None = None
    batch: Batch = "shared"
    exchange: ExchangeName = "auto"
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ArgumentError("distributed_config is out of range", faults=faults)

    def _faults(self) -> Iterator[Fault]:
        for name in ("ep_size", "fsdp_size", "dp_replicate_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield Fault(name, "too small", f"expected 1 or more, found {value}")
        if not self.timeout_seconds > 0:
            yield Fault("timeout_seconds", "not a positive number", f"found {self.timeout_seconds}")
        for name, choices in (("batch", get_args(Batch)), ("exchange", get_args(ExchangeName))):
            if (value := getattr(self, name)) not in choices:
                yield Fault(name, "unknown", f"expected {' or '.join(choices)}, found {value!r}")
        if self.batch == "distinct" and self.exchange == "all_reduce":
            yield Fault("exchange", "unsupported", "all_reduce adds up outputs for one batch that all ranks share")
        if self.batch == "shared" and self.exchange not in ("auto", "all_reduce"):
            yield Fault("exchange", "unsupported", f"{self.exchange} brings together what ranks do not share")

    def grid(self, ranks: int, num_experts: int) -> Grid:
        """How `ranks` ranks are used; num_experts: the fewest of any sparse layer.  ArgumentError: they do not fit."""
        ep = self._ep(ranks, num_experts)
        replicate = self.dp_replicate_size or (ranks // self.fsdp_size if self.fsdp_size > 1 else 1)
        if faults := list(self._misfits(ranks, ep, replicate)):
            raise ArgumentError(f"distributed_config does not fit {ranks} ranks", faults=faults)
        return Grid(replicate, ranks // replicate // ep, ep, self.fsdp_size)

    def _ep(self, ranks: int, num_experts: int) -> int:
        if self.ep_size is not None:
            return self.ep_size
        if not self.enable_expert_parallel:
            return 1
        return max(size for size in range(1, ranks + 1) if ranks % size == 0 and size <= max(1, num_experts))

    def _misfits(self, ranks: int, ep: int, replicate: int) -> Iterator[Fault]:
        if ranks % ep:
            yield Fault("ep_size", "does not divide", f"{ranks} ranks cannot be grouped by {ep}")
        if self.fsdp_size > 1 and replicate * self.fsdp_size != ranks:
            yield Fault("fsdp_size", "does not fit", f"{replicate} copies of {self.fsdp_size} are not {ranks} ranks")
        elif self.fsdp_size > 1 and self.fsdp_size % ep:
            yield Fault(
                "fsdp_size", "does not fit", f"{self.fsdp_size} is no multiple of {ep} ranks that share experts"
            )
        elif not ranks % ep and ranks % (replicate * ep):
            yield Fault("dp_replicate_size", "does not divide", f"{ranks} ranks are not {replicate} times {ep}")
