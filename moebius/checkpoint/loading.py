"""Runs a plan: each stored tensor is read once, straight into its place in the packed parameters.

On the CPU, what lies in the file as it will lie in memory is mapped, or read into place; what does not (a cast, a
permutation, another device) goes through one small staging buffer a thread, block by block.  Memory so never holds a
tensor twice.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import torch

from moebius.checkpoint import checksums
from moebius.checkpoint.blocks import whole_block
from moebius.checkpoint.decoding import read_decoded
from moebius.checkpoint.device import READERS, Lane, PinnedSlots, cuda_feed, send
from moebius.checkpoint.extents import Extent, extents
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.jobs import Job, Run, Staged, jobs, pieces
from moebius.checkpoint.mapping import Mapper, by_target, mappable
from moebius.checkpoint.packing import read_packed
from moebius.checkpoint.packing_batches import read_batched
from moebius.checkpoint.pages import make_present
from moebius.checkpoint.planning import DEVICE_PACKING_BYTES, STAGING_BYTES, Decode, Pack, Plan, Read
from moebius.checkpoint.pool import default_readers, run_all, run_each
from moebius.checkpoint.reading import Shards, raw_bytes, read_into, torch_dtype
from moebius.checkpoint.staging import stage
from moebius.errors import CapacityError, CheckpointError, Fault

CPU = torch.device("cpu")
READ_BYTES = 16 << 20  # of a job: enough that starting it costs nothing, little enough to share the work


Devices = str | torch.device | Mapping[str, str | torch.device]
"""One for all targets, or one for each, by its name."""


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

    @property
    def device_threads(self) -> int:
        """To a GPU: more than processors, because they wait for copies."""
        return 0 if self.loading == "sync" else min(READERS, self.readers or READERS)


def check_room(plan: Plan, device: Devices) -> None:
    """Raises CapacityError if the plan's peak is more than a device has free now."""
    short = [
        f"{needed:,} bytes on {name}, {free:,} are free"
        for name, needed in needed_bytes(plan, device).items()
        if (free := free_bytes(name)) is not None and needed > free
    ]
    if short:
        raise CapacityError(
            f"{plan.files.folder} needs {'; '.join(short)}; no weight was read",
            advice="take a smaller dtype, or a larger device",
        )


def needed_bytes(plan: Plan, device: Devices) -> dict[str, int]:
    """Of each device, at the peak of loading."""
    nbytes = Counter[torch.device]()
    for name, place in _places(plan, device).items():
        nbytes[place] += plan.targets[name].nbytes
    return {str(place): held + _staging_bytes(plan, place) for place, held in nbytes.items()}


def _staging_bytes(plan: Plan, place: torch.device) -> int:
    """Of a device, beside its targets."""
    if plan.packs and place.type == "cuda":
        return DEVICE_PACKING_BYTES
    return plan.peak_bytes - plan.target_bytes


def free_bytes(device: str) -> int | None:
    """Memory that a device has free now; None where nothing is known of it."""
    return _free_bytes(torch.device(device))


def _places(plan: Plan, device: Devices) -> dict[str, torch.device]:
    """The device of each target."""
    if isinstance(device, Mapping):
        return {name: _place(device[name]) for name in plan.targets}
    return dict.fromkeys(plan.targets, _place(device))


def _place(device: str | torch.device) -> torch.device:
    found = torch.device(device)
    return CPU if found.type == "cpu" else found


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
    device: Devices = "cpu",
    progress: Progress | None = None,
    check_tensors: bool = False,
    options: LoadOptions = LoadOptions(),  # frozen
    pinned: PinnedSlots | None = None,
) -> dict[str, torch.Tensor]:
    """Reads the plan's tensors: {target name: tensor of the planned shape and dtype, on its device}.

    check_tensors: also compare checksums where there are any, and look for NaN in what was read.  pinned: for a GPU,
    slots that are being pinned already.
    Raises CheckpointError if a file changed since it was planned, ends early, holds NaN (if looked for), or holds a
    tied weight twice with different bytes.  Nothing half-filled is returned.
    """
    shown = progress or Silent()
    shown.start(plan.bytes_to_read, f"loading {plan.files.folder.name}")
    try:
        with Shards(plan.files.shards) as shards:
            return _Loader(plan, _places(plan, device), shards, shown, options, pinned).run(check_tensors)
    finally:
        shown.finish()


class _Tensors(dict[str, torch.Tensor]):
    """By name, each made when it is first asked for: readers begin before all memory is there."""

    def __init__(self, plan: Plan, devices: Mapping[str, torch.device]):
        super().__init__()
        self._targets, self._devices, self._lock = plan.targets, devices, Lock()

    def __missing__(self, name: str) -> torch.Tensor:
        with self._lock:
            if name not in self:
                target = self._targets[name]
                dtype = torch_dtype(target.dtype)
                self[name] = torch.empty(target.shape, dtype=dtype, device=self._devices[name])
        return self[name]


class _Loader:
    def __init__(
        self,
        plan: Plan,
        devices: Mapping[str, torch.device],
        shards: Shards,
        shown: Progress,
        options: LoadOptions,
        pinned: PinnedSlots | None,
    ):
        self._plan, self._devices, self._shards, self._options = plan, devices, shards, options
        self._pinned = pinned
        self._shown, self._lock = shown, Lock()
        self._tensors = _Tensors(plan, devices)

    def run(self, check: bool) -> dict[str, torch.Tensor]:
        if check:
            self._refuse(checksums.check(self._plan.files, threads=self._options.threads))
        todo = self._by_device(jobs(self._plan))
        mapped = CPU in todo and self._options.mapping == "auto" and mappable(self._plan.files.folder)
        for device, mine in todo.items():
            if device == CPU:
                self._read_all(mine, mapped)
            else:
                self._send(mine, device)
        for decode in self._plan.decodes:  # on this thread: its arithmetic spreads over the processors itself
            read_decoded(decode, self._tensors, self._shards.read_into)
            self._advance(decode.nbytes)
        faults = [*self._pack_all(check), *(self._nan() if check else ()), *self._doubles(), *self._constants()]
        self._refuse(faults)
        self._shards.check()
        return {name: self._tensors[name] for name in self._plan.targets}

    def _refuse(self, faults: Sequence[Fault]) -> None:
        if faults:
            raise CheckpointError(f"bad weights in {self._plan.files.folder}; no model was made", faults=faults)

    # --- memory --------------------------------------------------------------------------------------------------

    def _by_device(self, todo: Iterator[Job]) -> Mapping[torch.device, Iterable[Job]]:
        """One device's jobs are made while they are done."""
        grouped: dict[torch.device, list[Job]] = {device: [] for device in self._devices.values()}
        if len(grouped) == 1:
            return dict.fromkeys(grouped, todo)
        for job in todo:
            grouped[self._devices[job.target]].append(job)
        return grouped

    def _map(self, runs: Sequence[Run]) -> list[Run]:
        """Makes the host's tensors; what could not be mapped is still to be read."""
        mapper, grouped, rest = Mapper(self._shards), by_target(runs), list[Run]()
        for name, target in self._plan.targets.items():
            if self._devices[name] == CPU:
                mine = grouped.get(name, [])
                self._tensors[name], left = mapper.tensor(target, mine)
                self._advance(sum(run.nbytes for run in mine) - sum(run.nbytes for run in left))
                rest += left
        return rest

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _read_all(self, jobs: Iterable[Job], mapped: bool) -> None:
        """Fills tensors on the host."""
        todo = list(jobs)
        runs, threads = [job for job in todo if isinstance(job, Run)], self._options.threads
        runs = self._map(runs) if mapped else runs
        run_all((piece for run in runs for piece in pieces(run, READ_BYTES)), self._read, threads)
        staged = (job for job in todo if isinstance(job, Staged))
        stage(staged, self._tensors, self._shards, readers=threads, advance=self._advance)

    def _send(self, todo: Iterable[Job], device: torch.device) -> None:
        """Fills tensors on a GPU."""
        with cuda_feed(device, self._slots()) as feed:

            def begin() -> Callable[[Extent], None]:
                lane = feed.lane()
                return lambda extent: self._send_one(extent, lane)

            run_each(extents(todo, feed.slot_bytes), begin, self._options.device_threads)

    def _send_one(self, extent: Extent, lane: Lane) -> None:
        send(extent, lane, self._tensors, self._shards)
        self._advance(sum(job.payload for job in extent.jobs))

    def _read(self, run: Run) -> None:
        place = self._tensors[run.target].view(-1).view(torch.uint8)[run.start : run.start + run.nbytes]
        make_present(place)
        read_into(self._shards.descriptor(run.file), raw_bytes(place), run.offset, run.file)
        self._advance(run.nbytes)

    def _slots(self) -> PinnedSlots:
        """Of all GPUs, one after the other."""
        self._pinned = self._pinned or PinnedSlots()
        return self._pinned

    def _pack_all(self, check: bool) -> list[Fault]:
        """Quantizes what the plan says; faults are NaN, if that is looked for."""
        packs: dict[torch.device, list[Pack]] = {}
        for pack in self._plan.packs:
            packs.setdefault(self._devices[pack.name], []).append(pack)
        faults = [fault for device, mine in packs.items() for fault in self._pack(mine, device, check)]
        if self._pinned:
            self._pinned.unpin()
        return faults

    def _pack(self, packs: Sequence[Pack], device: torch.device, check: bool) -> list[Fault]:
        kept = {"advance": self._advance, "look_for_nan": check}
        if device == CPU:
            threads = self._options.threads
            return read_packed(packs, self._tensors, self._shards.read_into, threads=threads, **kept)
        with cuda_feed(device, self._slots()) as feed:
            threads = self._options.device_threads
            return read_batched(packs, self._tensors, self._shards, feed, threads=threads, **kept)

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._shown.advance(nbytes)

    # --- looking at what was read --------------------------------------------------------------------------------

    def _nan(self) -> list[Fault]:
        ways = (*self._plan.reads, *self._plan.decodes)
        return [Fault(way.info.name, "NaN", f"in {way.info.file}") for way in ways if _has_nan(way, self._tensors)]

    def _doubles(self) -> list[Fault]:
        """Tied weights that are stored twice must hold the same values, as they are stored: a cast may hide it."""
        faults, firsts = [], {part.name: read.info for read in self._plan.reads for part in read.parts}
        for info, name in self._plan.doubles:
            tensor, first = self._tensors[name], firsts.get(name)
            cast = torch_dtype(info.dtype) != tensor.dtype
            alike = _alike(self._shards, info, first) if first and cast else _equals(self._shards, info, tensor)
            if not alike:
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


def _has_nan(way: Read | Decode, tensors: Mapping[str, torch.Tensor]) -> bool:
    blocks = ((tensors[part.name], whole_block(part, way.info.shape, tensors[part.name].shape)) for part in way.parts)
    views = (target.as_strided(block.shape, block.strides, block.offset) for target, block in blocks)
    return any(view.is_floating_point() and bool(view.isnan().any()) for view in views)


def _equals(shards: Shards, info: TensorInfo, tensor: torch.Tensor) -> bool:
    """Does the tensor hold the values that are stored?"""
    for start, found in _stored(shards, info):
        held = tensor.reshape(-1)[start : start + found.numel()]
        if not _same(found.to(device=held.device, dtype=held.dtype), held):
            return False
    return True


def _alike(shards: Shards, one: TensorInfo, other: TensorInfo) -> bool:
    """Are the same values stored twice?"""
    return all(_same(a, b) for (_, a), (_, b) in zip(_stored(shards, one), _stored(shards, other), strict=True))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _stored(shards: Shards, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
    """A stored tensor, flat, a buffer at a time: (its first element's number, elements until the next)."""
    size, elements = ITEM_BYTES[info.dtype], math.prod(info.shape)
    staging = torch.empty(min(elements, max(1, STAGING_BYTES // size)), dtype=torch_dtype(info.dtype))
    for start in range(0, elements, max(1, staging.numel())):
        found = staging[: min(staging.numel(), elements - start)]
        shards.read_into(info, raw_bytes(found), start * size)
        yield start, found
