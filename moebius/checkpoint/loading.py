"""Runs a plan: each stored tensor is read once, straight into its place in the packed parameters.

On the CPU, what lies in the file as it will lie in memory is mapped, or read into place; what does not (a cast, a
permutation, another device) goes through one small staging buffer a thread, block by block.  Memory so never holds a
tensor twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import torch

from moebius.checkpoint.blocks import cut, whole_block
from moebius.checkpoint.decoding import read_decoded
from moebius.checkpoint.device import READERS, SLOT_BYTES, cuda_lanes, send
from moebius.checkpoint.extents import Extent, extents
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.jobs import Job, Run, Staged, jobs, pieces
from moebius.checkpoint.mapping import Mapper, by_target, mappable
from moebius.checkpoint.planning import STAGING_BYTES, Decode, Plan, Read
from moebius.checkpoint.pool import default_readers, run_all
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype
from moebius.errors import CapacityError, CheckpointError, Fault

READ_BYTES = 16 << 20  # of a job: enough that starting it costs nothing, little enough to share the work
CAST_ELEMENTS = 1 << 15  # torch copies so many on one thread; more would start a team of threads in every reader


class Progress(Protocol):
    """Told how many bytes will be read, how many were, and that it is over."""

    def start(self, total_bytes: int, label: str) -> None: ...
    def advance(self, nbytes: int) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """A Progress that tells nobody."""

    def start(self, total_bytes: int, label: str) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class LoadOptions:
    """How a plan is run; what it gives is the same, bit for bit.

    loading: "async" reads on several threads, "sync" on this one, in the files' order.  mapping: "auto" maps pages of
    files on local disks into CPU tensors, "never" copies them.  readers: threads, None one a processor.
    """

    loading: Literal["async", "sync"] = "async"
    mapping: Literal["auto", "never"] = "auto"
    readers: int | None = None

    @property
    def threads(self) -> int:
        return 0 if self.loading == "sync" else self.readers or default_readers()


def check_room(plan: Plan, device: torch.device) -> None:
    """Raises CapacityError if the plan's peak is more than the device has free now."""
    free = _free_bytes(device)
    if free is not None and plan.peak_bytes > free:
        raise CapacityError(
            f"{plan.files.folder} needs {plan.peak_bytes:,} bytes on {device}, {free:,} are free; no weight was read",
            advice="take a smaller dtype, or a larger device",
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no such file outside Linux: nothing is known, so nothing is refused
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def load(
    plan: Plan,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    check_tensors: bool = False,
    options: LoadOptions = LoadOptions(),  # frozen
) -> dict[str, torch.Tensor]:
    """Reads the plan's tensors: {target name: tensor of the planned shape and dtype, on `device`}.

    check_tensors: also look for NaN in what was read.
    Raises CheckpointError if a file changed since it was planned, ends early, holds NaN (if looked for), or holds a
    tied weight twice with different bytes.  Nothing half-filled is returned.
    """
    shown = progress or Silent()
    shown.start(plan.bytes_to_read, f"loading {plan.files.folder.name}")
    try:
        with Shards(plan.files.shards) as shards:
            return _Loader(plan, torch.device(device), shards, shown, options).run(check_tensors)
    finally:
        shown.finish()


class _Loader:
    def __init__(self, plan: Plan, device: torch.device, shards: Shards, shown: Progress, options: LoadOptions):
        self._plan, self._device, self._shards, self._options = plan, device, shards, options
        self._shown, self._lock = shown, Lock()
        self._tensors: dict[str, torch.Tensor] = {}

    def run(self, check: bool) -> dict[str, torch.Tensor]:
        todo = jobs(self._plan)
        rest = self._allocate([job for job in todo if isinstance(job, Run)])
        if self._device.type == "cuda":
            self._send(todo)
        else:
            staged = [job for job in todo if isinstance(job, Staged)]
            run_all(_small([*rest, *staged]), self._do, self._options.threads)
        for decode in self._plan.decodes:  # on this thread: its arithmetic spreads over the processors itself
            read_decoded(decode, self._tensors, self._shards.read_into)
            self._advance(decode.info.nbytes)
        faults = [*(self._nan() if check else ()), *self._doubles(), *self._constants()]
        if faults:
            raise CheckpointError(f"bad weights in {self._plan.files.folder}; no model was made", faults=faults)
        return self._tensors

    # --- memory --------------------------------------------------------------------------------------------------

    def _allocate(self, runs: Sequence[Run]) -> list[Run]:
        """Makes all tensors; what is not mapped is still to be read."""
        if self._device.type != "cpu" or self._options.mapping == "never" or not mappable(self._plan.files.folder):
            for name, target in self._plan.targets.items():
                self._tensors[name] = torch.empty(target.shape, dtype=torch_dtype(target.dtype), device=self._device)
            return list(runs)
        mapper, grouped, rest = Mapper(self._shards), by_target(runs), list[Run]()
        for name, target in self._plan.targets.items():
            mine = grouped.get(name, [])
            self._tensors[name], left = mapper.tensor(target, mine)
            self._advance(sum(run.nbytes for run in mine) - sum(run.nbytes for run in left))
            rest += left
        return rest

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _send(self, todo: Sequence[Job]) -> None:
        """Fills tensors on a GPU."""
        threads = 0 if self._options.loading == "sync" else self._options.readers or READERS
        with cuda_lanes(self._device) as lanes:

            def work(extent: Extent) -> None:
                lane = lanes.get()
                send(extent, lane, self._tensors, self._shards)
                lanes.put(lane)
                self._advance(sum(job.payload for job in extent.jobs))

            run_all(extents(todo, SLOT_BYTES), work, min(threads, READERS))

    def _do(self, job: Job) -> None:
        match job:
            case Run():
                self._read(job)
            case Staged():
                self._read_staged(job)
        self._advance(job.payload)

    def _read(self, run: Run) -> None:
        place = raw_bytes(self._tensors[run.target])[run.start : run.start + run.nbytes]
        read_into(self._shards.descriptor(run.file), place, run.offset, run.file)

    def _read_staged(self, job: Staged) -> None:
        """Reads as much as stays in the cache, and copies that in pieces that torch does on one thread."""
        info, size, target = job.info, ITEM_BYTES[job.info.dtype], self._tensors[job.target]
        staging = torch.empty(min(job.block.length, max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
        buffer = raw_bytes(staging)
        for piece in cut(job.block, staging.numel()):
            self._shards.read_into(info, buffer[: piece.length * size], piece.start * size)
            for part in cut(piece, CAST_ELEMENTS):
                found = staging.as_strided(part.shape, part.stored_strides, part.start - piece.start)
                target.as_strided(part.shape, part.strides, part.offset).copy_(found)

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._shown.advance(nbytes)

    # --- looking at what was read --------------------------------------------------------------------------------

    def _nan(self) -> list[Fault]:
        ways = (*self._plan.reads, *self._plan.decodes)
        return [Fault(way.info.name, "NaN", f"in {way.info.file}") for way in ways if _has_nan(way, self._tensors)]

    def _doubles(self) -> list[Fault]:
        """Tied weights that are stored twice must hold the same values."""
        faults = []
        for info, name in self._plan.doubles:
            if not _equals(self._shards, info, self._tensors[name]):
                faults.append(Fault(info.name, "tied weights differ", f"{info.file}: not the values of {name}"))
            self._advance(info.nbytes)
        return faults

    def _constants(self) -> list[Fault]:
        """What a stored tensor says of others must be so."""
        faults = []
        for constant in self._plan.constants:
            info = constant.info
            found = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            self._shards.read_into(info, raw_bytes(found), 0)
            if found.tolist() != list(constant.expected):
                detail = f"{info.file}: it says {found.tolist()}, expected {list(constant.expected)}"
                faults.append(Fault(info.name, "wrong shape", detail))
            self._advance(info.nbytes)
        return faults


def _small(todo: Iterable[Job]) -> Iterable[Job]:
    """The jobs, long runs in pieces."""
    return (piece for job in todo for piece in (pieces(job, READ_BYTES) if isinstance(job, Run) else (job,)))


def _has_nan(way: Read | Decode, tensors: Mapping[str, torch.Tensor]) -> bool:
    blocks = ((tensors[part.name], whole_block(part, way.info.shape, tensors[part.name].shape)) for part in way.parts)
    views = (target.as_strided(block.shape, block.strides, block.offset) for target, block in blocks)
    return any(view.is_floating_point() and bool(view.isnan().any()) for view in views)


def _equals(shards: Shards, info: TensorInfo, tensor: torch.Tensor) -> bool:
    size = ITEM_BYTES[info.dtype]
    staging = torch.empty(min(tensor.numel(), max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
    for start in range(0, tensor.numel(), staging.numel()):
        held = tensor.reshape(-1)[start : start + staging.numel()]
        shards.read_into(info, raw_bytes(staging)[: held.numel() * size], start * size)
        found = staging[: held.numel()].to(device=held.device, dtype=held.dtype)
        if not torch.allclose(found, held, rtol=0, atol=0, equal_nan=True):
            return False
    return True
