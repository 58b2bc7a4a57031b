"""Rows between ranks: torch.distributed's calls, without autograd, for tensors whose first axis counts rows.

N ranks of the group, T rows, K experts a token.  gloo and NCCL both have every call used here, for every dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moebius.distributed.roll_call import is_lost, lost

FOREIGN = -1
"""An expert's id that is nobody's."""

if torch.__version__ >= "2.13":  # where the former names, all that 2.11 has, warn that they will go
    from torch.distributed import all_gather_single as _all_gather
    from torch.distributed import reduce_scatter_single as _reduce_scatter
else:
    from torch.distributed import all_gather_into_tensor as _all_gather
    from torch.distributed import reduce_scatter_tensor as _reduce_scatter


class Coming(NamedTuple):
    """Rows on their way."""

    rows: Tensor
    work: dist.Work
    group: dist.ProcessGroup

    def arrived(self) -> Tensor:
        """The rows, from here on fit to be read; on CUDA it is the stream that waits, not the host."""
        with _answered(self.group):
            self.work.wait()
        return self.rows


def gather(rows: Tensor, group: dist.ProcessGroup) -> Coming:
    """[T, ...] of every rank, T alike on all -> [N*T, ...] in the order of ranks."""
    everyone = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    with _answered(group):
        work = _all_gather(everyone, rows.contiguous(), group=group, async_op=True)
    return Coming(everyone, cast(dist.Work, work), group)


def add_and_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N*T, ...] -> [T, ...]: the sum over all ranks of what they have for this one."""
    total = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    with _answered(group):
        _reduce_scatter(total, rows.contiguous(), group=group)
    return total


def add(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks, in place where the tensor is contiguous."""
    total = tensor.contiguous()
    with _answered(group):
        dist.all_reduce(total, group=group)
    return total


def swap(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Coming:
    """sent[r] rows for each rank r, one after the other -> received[r] rows from each."""
    theirs = rows.new_empty(sum(received), *rows.shape[1:])
    with _answered(group):
        work = dist.all_to_all_single(theirs, rows.contiguous(), list(received), list(sent), group=group, async_op=True)
    return Coming(theirs, cast(dist.Work, work), group)


@contextmanager
def _answered(group: dist.ProcessGroup) -> Iterator[None]:
    """RankError: some rank is not there.  On CUDA it is NCCL's watchdog that finds that out, and ends the process."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost(f"rank {dist.get_rank()}: within a step", group.size(), error) from error


def padded(rows: Tensor, length: int, value: int = 0) -> Tensor:
    """[T, C] -> [length, C]; length >= T."""
    missing = length - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing), value=value) if missing else rows


def packed_routes(top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ids and weights [T, K] as one [T, bytes] uint8, to travel in one call; ids as int32."""
    return torch.cat([_bytes(top_k_index.to(torch.int32)), _bytes(top_k_weights)], dim=1)


def unpacked_routes(routes: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What was packed: ids [T, K] int64, weights [T, K] in the dtype of `like` [any, K]."""
    ids, weights = routes.split([4 * like.shape[1], like.itemsize * like.shape[1]], dim=1)
    return _read(ids, torch.int32).long(), _read(weights, like.dtype)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _read(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of its own, which begins where a number of any dtype may begin."""
    return columns.clone(memory_format=torch.contiguous_format).view(dtype)
