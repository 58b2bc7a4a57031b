"""How a model is spread over ranks, as data.  No torch.

N ranks; ep of them share one set of experts, N / ep sets are copies of one another; E experts a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from moebius.errors import ArgumentError, Fault

Batch = Literal["shared", "distinct"]
ExchangeName = Literal["auto", "all_reduce", "gather_scatter", "all_to_all"]
MOST_SECONDS = 1e9  # 31 years; torch counts nanoseconds in 64 bits


DEFAULT_SECONDS = 600.0


class Grid(NamedTuple):
    """The ranks as a box, the last axis running fastest: rank = (replica * efsdp + copy) * ep + place.

    replicate * efsdp ranks hold the same experts; with fsdp > 1 the efsdp of one replica keep a shard each of them.
    fsdp: ranks that keep a shard each of everything else, 1 where each holds it whole.
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
    timeout_seconds: after which a collective that some rank does not join ends the job; default: DEFAULT_SECONDS, and a
    process group that was there before keeps its own.

    Raises ArgumentError that lists every field out of range.
    """

    enable_expert_parallel: bool = False
    ep_size: int | None = None
    fsdp_size: int = 1
    dp_replicate_size: int | None = None
    batch: Batch = "shared"
    exchange: ExchangeName = "auto"
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ArgumentError("distributed_config is out of range", faults=faults)

    def _faults(self) -> Iterator[Fault]:
        found = (
            _flag_fault("enable_expert_parallel", self.enable_expert_parallel),
            _size_fault("ep_size", self.ep_size, optional=True),
            _size_fault("fsdp_size", self.fsdp_size, optional=False),
            _size_fault("dp_replicate_size", self.dp_replicate_size, optional=True),
            _choice_fault("batch", self.batch, get_args(Batch)),
            _choice_fault("exchange", self.exchange, get_args(ExchangeName)),
            _seconds_fault("timeout_seconds", self.timeout_seconds),
        )
        yield from (fault for fault in found if fault)
        if not any(fault and fault.where in ("batch", "exchange") for fault in found):
            yield from self._contradictions()

    def _contradictions(self) -> Iterator[Fault]:
        if self.batch == "distinct" and self.exchange == "all_reduce":
            yield Fault("exchange", "unsupported", "all_reduce adds up outputs for one batch that all ranks share")
        if self.batch == "shared" and self.exchange not in ("auto", "all_reduce"):
            yield Fault("exchange", "unsupported", f"{self.exchange} brings together what ranks do not share")

    @property
    def seconds(self) -> float:
        """How long ranks wait for one another."""
        return DEFAULT_SECONDS if self.timeout_seconds is None else self.timeout_seconds

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


# --- one field -------------------------------------------------------------------------------------------------------


def _flag_fault(name: str, value: object) -> Fault | None:
    return None if isinstance(value, bool) else Fault(name, "type", f"expected True or False, found {value!r}")


def _size_fault(name: str, value: object, *, optional: bool) -> Fault | None:
    if value is None and optional:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        return Fault(name, "type", f"expected a whole number{' or None' if optional else ''}, found {value!r}")
    return None if value >= 1 else Fault(name, "too small", f"expected 1 or more, found {value}")


def _choice_fault(name: str, value: object, choices: Sequence[str]) -> Fault | None:
    if isinstance(value, str) and value in choices:
        return None
    return Fault(name, "unknown", f"expected {' or '.join(choices)}, found {value!r}")


def _seconds_fault(name: str, value: object) -> Fault | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return Fault(name, "type", f"expected a number or None, found {value!r}")
    if 0 < value <= MOST_SECONDS:
        return None
    return Fault(name, "out of range", f"expected more than 0 and at most {MOST_SECONDS:g}, found {value}")
