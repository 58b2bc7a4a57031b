"""Gradients of what several ranks hold, made those of one process.

An exchange brings each expert the tokens of all ranks that share its set, so its gradient is whole there; what else
ranks hold in common has seen each rank's own tokens alone.  Where FSDP2 shards a parameter, it sums the gradient up.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebius.distributed.collectives import add
from moebius.distributed.config import Batch
from moebius.distributed.ranks import Ranks
from moebius.distributed.spread import local
from moebius.layers.decoder import Decoder

BUCKET_BYTES = 64 << 20


class Held(NamedTuple):
    """Parameters of which the same part is on so many ranks (holders).

    summed: over how many ranks their gradient adds up.  group: those ranks, None where FSDP2 has done it.
    """

    parameters: Sequence[nn.Parameter]
    holders: int
    summed: int
    group: dist.ProcessGroup | None


class Gradients:
    """The gradients of a decoder's parameters on all ranks of a job.

    batch: "distinct": each rank's loss is its part of a sum over ranks, so that gradients add up.  "shared": every rank
    computes the same gradients; their mean keeps ranks from drifting apart by what kernels round differently.
    """

    def __init__(self, decoder: Decoder, ranks: Ranks, batch: Batch):
        self._ranks, self._batch = ranks, batch
        self._held = list(_held(decoder, ranks))

    def reduce(self) -> None:
        """After a backward on every rank: each gradient becomes that of all tokens."""
        for parameters, _, summed, group in self._held:
            gradients = [_gradient(parameter) for parameter in parameters]
            if group is not None and summed > 1:
                for bucket in _buckets(gradients):
                    _add_up(bucket, group)
            if self._batch == "shared":
                for gradient in gradients:
                    local(gradient).div_(summed)

    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients down to a global L2 norm of `max_norm` (1211.5063, section 3.2); gives the norm before,
        a float64 scalar, the same on every rank.
        """
        square = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for parameters, holders, _, _ in self._held:
            norm = torch.nn.utils.get_total_norm([local(_gradient(parameter)) for parameter in parameters])
            square += norm.double().square() / holders
        add(square, self._ranks.everyone)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameters, *_ in self._held:
            for parameter in parameters:
                gradient = local(_gradient(parameter))
                gradient.mul_(scale.to(gradient.dtype))
        return norm


def _held(decoder: Decoder, ranks: Ranks) -> Iterator[Held]:
    grid, roles = ranks.grid, decoder.parameter_roles()
    copies = ranks.axes(copies=grid.replicate * grid.efsdp, ep=grid.ep)
    trained = [(name, each) for name, each in decoder.named_parameters() if each.requires_grad]
    for routed, everywhere, group in (
        (True, grid.replicate * grid.efsdp, copies.get_group("copies")),
        (False, grid.ranks, ranks.everyone),
    ):
        mine = [each for name, each in trained if (roles[name] == "routed_experts") == routed]
        plain = [each for each in mine if not isinstance(each, DTensor)]
        sharded = [each for each in mine if isinstance(each, DTensor)]
        yield from (Held(plain, everywhere, everywhere, group),) if plain else ()
        yield from (Held(sharded, grid.replicate, everywhere, None),) if sharded else ()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where no token of this rank reached the parameter: the others' may have."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype, up to about BUCKET_BYTES: few collectives, little memory beside."""
    bucket, nbytes = list[Tensor](), 0
    for gradient in sorted(gradients, key=lambda each: str(each.dtype)):
        if bucket and (bucket[0].dtype != gradient.dtype or nbytes + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(gradient)
        nbytes += gradient.nbytes
    if bucket:
        yield bucket


def _add_up(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    if len(gradients) == 1 and gradients[0].is_contiguous():  # a large one, of which no copy is made
        add(gradients[0], group)
        return
    flat = add(torch.cat([gradient.flatten() for gradient in gradients]), group)
    for gradient, found in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(found.view_as(gradient))
