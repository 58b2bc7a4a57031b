"""The processes of one job: who this one is, and how they agree.

What concerns the host (errors, counts, ids) goes through a gloo group of its own, which a GPU's stream never holds up.
"""

import atexit
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moebius import errors
from moebius.distributed.config import DistributedConfig, Grid
from moebius.errors import ArgumentError, Fault, MoebiusError, RankError

AXES = ("replicate", "efsdp", "ep")
CALL_ON_ALL = "look at what the other ranks said first; a step that all share must be called on every rank"
AFTER_TIMEOUT, AFTER_TIMEOUT_MS = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000"
"""NCCL's watchdog ends the process four times this long after a time limit, for what it writes down; torch has 15 s."""
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """This process among the others.

    rank, size: in the whole job.  device: this process's.  grid: how the ranks are used.  mesh: the same as torch's
    DeviceMesh, with the axes of AXES.  host: a gloo group of all ranks.
    """

    def __init__(self, device: torch.device, grid: Grid, mesh: DeviceMesh, host: dist.ProcessGroup, seconds: float):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.grid, self.mesh, self.host = device, grid, mesh, host
        self._seconds, self._meetings = seconds, 0
        self._store = dist.distributed_c10d._get_default_store()

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    @property
    def experts(self) -> dist.ProcessGroup:
        """The ranks that share one set of experts with this one, by the device's own backend."""
        return self.mesh.get_group("ep")

    @property
    def place(self) -> int:
        """Which share of the experts is this rank's."""
        return self.grid.place(self.rank)

    def gathered(self, value: T, what: str) -> Sequence[T]:
        """Every rank's value, in the order of ranks.  RankError: some rank did not join in time."""
        found: list[T] = [value] * self.size
        with self._answered(what):
            dist.all_gather_object(found, value, group=self.host)
        return found

    def told(self, value: T, what: str) -> T:
        """Rank 0's value, on every rank.  RankError: some rank did not join in time."""
        held = [value]
        with self._answered(what):
            dist.broadcast_object_list(held, src=0, group=self.host)
        return held[0]

    def meet(self, what: str, seconds: float) -> None:
        """Ends when every rank is here.  RankError: some are not within the seconds; it names them.

        It goes through the store in which ranks found each other: a meeting that fails leaves the groups as they were.
        """
        self._meetings += 1
        keys = [f"moebius/{self.host.group_name}/{self._meetings}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "")
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError as error:
            self._store.set(f"{keys[self.rank]}/left", "")
            away = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise self._apart(what, away, f"did not come within {seconds:g} s" if away else "came too late") from error
        if left := [rank for rank, key in enumerate(keys) if self._store.check([f"{key}/left"])]:
            raise self._apart(what, left, "came, and left before this rank was there")

    def _apart(self, what: str, others: Sequence[int], did: str) -> RankError:
        named = f"rank {', '.join(map(str, others))}" if others else "some"
        return RankError(f"rank {self.rank}: {what}: {named} of {self.size} {did}", advice=CALL_ON_ALL)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A step that ends well on all ranks or on none: an error on one is raised on all, and says whose it is."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # raised again below, once the others know
            error = caught
        try:
            found = self.gathered(_written(error), what)
        except RankError:
            if error:  # which says more than that others did not answer
                raise error from None
            raise
        failed = [(rank, written) for rank, written in enumerate(found) if written]
        if error:
            raise error
        if failed:
            raise _read(*failed[0])

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # as torch.distributed words it, some ranks are not there
            raise RankError(
                f"rank {self.rank}: {what}: not all of {self.size} ranks answered within "
                f"{self._seconds:g} s ({str(error).splitlines()[0][:300]})",
                advice=CALL_ON_ALL,
            ) from error


def join(config: DistributedConfig, num_experts: int, *, device_type: str | None = None) -> Ranks:
    """Joins the process group, or makes it from torchrun's environment; without torchrun, a job of one rank.

    num_experts: the fewest of any sparse layer.  device_type: "cuda" or "cpu"; default: cuda, if there is a GPU for
    each rank of this host.  ArgumentError: the config does not fit the ranks, or there are too few GPUs.
    """
    device = device_of(device_type)
    if not dist.is_initialized():
        _begin(device, config.timeout_seconds)
    grid = config.grid(dist.get_world_size(), num_experts)
    mesh = init_device_mesh(device.type, (grid.replicate, grid.efsdp, grid.ep), mesh_dim_names=AXES)
    host = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_seconds))
    assert isinstance(host, dist.ProcessGroup)  # every rank is in it
    return Ranks(device, grid, mesh, host, config.timeout_seconds)


def device_of(device_type: str | None) -> torch.device:
    """This rank's; device_type as in `join`."""
    place, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count() if device_type != "cpu" else 0
    if device_type == "cuda" and found < here:
        raise ArgumentError(f"{here} ranks on this host need a GPU each, found {found}")
    if found < here:
        if found and place == 0:
            logger.warning("%d ranks on this host and %d GPUs: all run on the CPU", here, found)
        return torch.device("cpu")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _begin(device: torch.device, seconds: float) -> None:
    """The default group; it ends with the process."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault(AFTER_TIMEOUT, AFTER_TIMEOUT_MS)
    options = {"timeout": timedelta(seconds=seconds), "device_id": device if device.type == "cuda" else None}
    if "RANK" in os.environ:
        dist.init_process_group(backend, **options)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)  # pyright: ignore[reportPrivateImportUsage]
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --- errors between ranks --------------------------------------------------------------------------------------------

Written = tuple[str, str, tuple[Fault, ...], str]


def _written(error: Exception | None) -> Written | None:
    match error:
        case None:
            return None
        case MoebiusError():
            return type(error).__name__, error.message, tuple(error.faults), error.advice
        case _:
            return RankError.__name__, f"{type(error).__name__}: {error}", (), ""


def _read(rank: int, written: Written) -> MoebiusError:
    """Another rank's error, of the same kind where it is one of ours."""
    name, message, faults, advice = written
    kind = getattr(errors, name, RankError)
    return kind(f"rank {rank}: {message}", faults=faults, advice=advice)
