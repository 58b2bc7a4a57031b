"""CPU tensors whose memory is the file's own pages, put together to the shape that the model needs.

A packed parameter is one range of addresses.  Where a run of the file has the same place within its page there as in
the file, its whole pages are mapped over the range, private and copy-on-write; the rest is read.  Nothing is copied, so
a parameter opens in the time that its mappings take, and its pages are those of the page cache.
"""

import ctypes
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moebius.checkpoint.jobs import Run, part_of
from moebius.checkpoint.planning import Target
from moebius.checkpoint.reading import Shards, torch_dtype
from moebius.errors import CapacityError

PAGE = mmap.PAGESIZE
LEAST_PAGES = 16  # shorter runs are read: a mapping costs about as much
MAX_MAPPINGS = 50_000  # of the 65,530 that Linux allows a process (vm.max_map_count)
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
# File systems that keep pages as long as a mapping lives; FUSE, NFS and the like may block or fail at any access.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "bcachefs"}


def mappable(folder: Path) -> bool:
    """Is the folder on a local file system?"""
    device = folder.stat().st_dev
    wanted = f"{device >> 8 & 0xFFF}:{device & 0xFF | device >> 12 & 0xFFF00}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return False
    kinds = {fields[2]: fields[fields.index("-") + 1] for line in lines if len(fields := line.split()) > 4}
    return kinds.get(wanted) in LOCAL


class Mapper:
    """Makes tensors out of file pages, as long as mappings are left."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._left = MAX_MAPPINGS
        self._mmap = ctypes.CDLL(None, use_errno=True).mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)

    def tensor(self, target: Target, runs: Sequence[Run]) -> tuple[torch.Tensor, list[Run]]:
        """The target's tensor, and what of its runs is still to be read."""
        residue = best_residue(target, runs)
        if residue is None:
            return torch.empty(target.shape, dtype=torch_dtype(target.dtype)), list(runs)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, residue + target.nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        elements = target.nbytes // torch_dtype(target.dtype).itemsize
        flat = torch.frombuffer(memory, dtype=torch_dtype(target.dtype), offset=residue, count=elements)
        rest = [piece for run in runs for piece in self._map(run, flat.data_ptr())]
        return flat.view(target.shape), rest

    def _map(self, run: Run, address: int) -> list[Run]:
        """Maps the whole pages of a run over its place in the tensor at `address`; what is left to be read."""
        begin, end = whole_pages(run, address)
        if end - begin < LEAST_PAGES * PAGE or (address + run.start - run.offset) % PAGE or not self._left:
            return [run]
        self._left -= 1
        head, length = begin - (address + run.start), end - begin
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
        descriptor = self._shards.descriptor(run.file)
        if self._mmap(begin, length, protection, flags, descriptor, run.offset + head) != begin:
            raise CapacityError(f"{run.file} could not be mapped: errno {ctypes.get_errno()}", advice='mapping="never"')
        tail = head + length
        borders = (part_of(run, 0, head), part_of(run, tail, run.nbytes - tail))
        return [piece for piece in borders if piece.nbytes]


def whole_pages(run: Run, address: int) -> tuple[int, int]:
    """The addresses between which a run fills whole pages of the tensor at `address`."""
    first, last = address + run.start, address + run.start + run.nbytes
    return -(-first // PAGE) * PAGE, last // PAGE * PAGE


def best_residue(target: Target, runs: Sequence[Run]) -> int | None:
    """Where in a page the tensor has to begin for most bytes to be mapped; None if nothing can be."""
    gained = Counter[int]()
    for run in runs:
        if run.nbytes >= (LEAST_PAGES + 1) * PAGE:
            gained[(run.offset - run.start) % PAGE] += run.nbytes
    aligned = {
        residue: nbytes for residue, nbytes in gained.items() if residue % torch_dtype(target.dtype).itemsize == 0
    }
    return max(aligned, key=lambda residue: aligned[residue], default=None)


def by_target(runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.target, []).append(run)
    return grouped
