"""The processes of one job: who this one is, and how they agree.

What concerns the host (errors, counts, ids) goes through a gloo group of its own, which a GPU's stream never holds up.
"""

import atexit
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from moebius.distributed.config import DistributedConfig, Grid
from moebius.distributed.roll_call import ADVICE, Place, RollCall, Written, read, written
from moebius.errors import ArgumentError, RankError

AFTER_TIMEOUT, AFTER_TIMEOUT_MS = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000"
"""NCCL's watchdog ends the process four times this long after a time limit, for what it writes down; torch has 15 s."""
IDLE_SECONDS = 0.1
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """This process among the others.

    rank, size: in the whole job.  device: this process's.  grid: how the ranks are used.  mesh: the same as torch's
    DeviceMesh, with the axes replicate, efsdp, ep.
    """

    def __init__(self, device: torch.device, grid: Grid, roll_call: RollCall, seconds: float):
        self.rank, self.size = roll_call.rank, roll_call.size
        self.device, self.grid, self.roll_call = device, grid, roll_call
        self._seconds, self._meetings = seconds, 0
        self._store = dist.distributed_c10d._get_default_store()
        self._axes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
        self.mesh = self.axes(replicate=grid.replicate, efsdp=grid.efsdp, ep=grid.ep)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks, by the device's own backend."""
        group = dist.group.WORLD
        assert group is not None  # it is there as long as this is
        return group

    @property
    def experts(self) -> dist.ProcessGroup:
        """The ranks that share one set of experts with this one, by the device's own backend."""
        return self.mesh.get_group("ep")

    @property
    def place(self) -> int:
        """Which share of the experts is this rank's."""
        return self.grid.place(self.rank)

    def axes(self, **sizes: int) -> DeviceMesh:
        """All ranks along axes of these sizes, the last one innermost; every rank asks for the same in the same order.

        Made once: each of its groups has a communicator.  Their time limit is the job's; torch gives them its own.
        """
        names = tuple(sizes.items())
        if names not in self._axes:
            mesh = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            for group in map(mesh.get_group, sizes):
                if group is not dist.group.WORLD:
                    _set_pg_timeout(timedelta(seconds=self._seconds), group)
            self._axes[names] = mesh
        return self._axes[names]

    def gathered(self, value: T, what: str) -> Sequence[T]:
        """Every rank's value, in the order of ranks.  RankError: some rank did not join in time, or is elsewhere.

        Where another rank has failed, and this one has not come to the end of that step, it is that rank's error.
        """
        return self.roll_call.gathered(value, what)

    def told(self, value: T, what: str) -> T:
        """Rank 0's value, on every rank.  RankError: as `gathered`."""
        return cast(T, self.gathered(value if self.first else None, what)[0])

    def meet(self, what: str, seconds: float) -> None:
        """Ends when every rank is here.  RankError: some are not within the seconds; it names them.

        It goes through the store in which ranks found each other: a meeting that fails leaves the groups as they were.
        """
        self._meetings += 1
        meeting = f"moebius/{self.roll_call.group.group_name}/{self._meetings}"
        keys = [f"{meeting}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "")
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError as error:
            self._store.set(f"{keys[self.rank]}/left", "")
            if self._store.compare_set(f"{meeting}/met", "", "no") == b"yes":
                return
            away = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise self._apart(what, away, f"did not come within {seconds:g} s" if away else "came too late") from error
        if self._store.compare_set(f"{meeting}/met", "", "yes") == b"no":  # the first to know decides for all
            left = [rank for rank, key in enumerate(keys) if self._store.check([f"{key}/left"])]
            raise self._apart(what, left, "came, and left before this rank was there")

    def _apart(self, what: str, others: Sequence[int], did: str) -> RankError:
        named = f"rank {', '.join(map(str, others))}" if others else "some"
        return RankError(f"rank {self.rank}: {what}: {named} of {self.size} {did}", advice=ADVICE)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A step that ends well on all ranks or on none: an error on one is raised on all, and says whose it is."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # raised again below, once the others know
            if caught is self.roll_call.apart:
                raise
            error = caught
        try:
            answers = self.roll_call.answers(Place.END, what, content=error and written(error))
        except RankError as apart:
            if error is None:
                raise
            if apart is self.roll_call.apart:
                self.roll_call.apart = error
            raise error from None  # it says more than that others did not answer
        if error:
            raise error
        for rank, answer in enumerate(answers):
            if isinstance(answer.content, Written):
                raise read(rank, answer.content)


def join(config: DistributedConfig, num_experts: int, *, device_type: str | None = None) -> Ranks:
    """Joins the process group, or makes it from torchrun's environment; without torchrun, a job of one rank.

    num_experts: the fewest of any sparse layer.  device_type: "cuda" or "cpu"; default: cuda, if there is a GPU for
    each rank of this host.  ArgumentError: the config does not fit the ranks, or there are too few GPUs.
    """
    device = device_of(device_type)
    limit = timedelta(seconds=config.seconds)
    if not dist.is_initialized():
        _begin(device, limit)
    elif config.timeout_seconds is not None:
        _set_pg_timeout(limit)
    host = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(host, dist.ProcessGroup)  # every rank is in it
    roll_call = RollCall(host)
    roll_call.check_same({**vars(config), "experts of a layer": num_experts}, "distributed_config")
    grid = config.grid(roll_call.size, num_experts)
    return Ranks(device, grid, roll_call, config.seconds)


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


def _begin(device: torch.device, limit: timedelta) -> None:
    """The default group; it ends with the process."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault(AFTER_TIMEOUT, AFTER_TIMEOUT_MS)
    store, rank, size = dist.HashStore(), 0, 1  # pyright: ignore[reportPrivateImportUsage]
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        _check_devices(store, rank, size, device.type)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("moebius", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    atexit.register(_end)


def _check_devices(store: Any, rank: int, size: int, kind: str) -> None:
    """ArgumentError: they are of different kinds.  Each rank then would wait for others in groups that these lack."""
    store.set(f"device/{rank}", kind)
    kinds = [found.decode() for found in store.multi_get([f"device/{each}" for each in range(size)])]
    if other := next((each for each, found in enumerate(kinds) if found != kinds[0]), None):
        raise ArgumentError(
            f"rank {other} would run on {kinds[other]}, rank 0 on {kinds[0]}",
            advice="run no more ranks on a host than it has GPUs, or hide them from all ranks (CUDA_VISIBLE_DEVICES=)",
        )


def _end() -> None:
    """While the interpreter is whole: a thread of gloo's that lets go of a last tensor after that aborts the process
    (pytorch#179291).  Groups end with the last that refers to them, not here, and nothing says when threads are idle.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(IDLE_SECONDS)
