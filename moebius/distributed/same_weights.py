"""Whether ranks hold the same model: hosts may have files of the same names with other weights.

What several ranks hold is compared by a sample of each tensor, which costs milliseconds.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.distributed.spread import Spread, local
from moebius.errors import CheckpointError, Fault
from moebius.layers.decoder import Decoder

SAMPLED = 256  # numbers of a tensor


class Sample(NamedTuple):
    """rows: first and last, of axis 0, that this rank holds; None: all.  number: of some bytes in their middle."""

    rows: tuple[int, int] | None
    number: int


def check_same_weights(decoder: Decoder, spread: Spread) -> None:
    """CheckpointError, on every rank: two ranks hold the same rows of a tensor, and not the same numbers in it."""
    samples = _samples({name: local(each.detach()) for name, each in decoder.named_parameters()}, spread.boxes)
    everyone = spread.ranks.gathered(samples, "comparing weights")
    faults = [
        Fault(name, "other weights", f"on rank {rank} than on rank {first}")
        for name, (first, rank) in _differences(everyone).items()
    ]
    if faults:
        raise CheckpointError(
            "the ranks have read different weights from files of the same names",
            faults=faults,
            advice="give every host the same files",
        )


def _samples(tensors: Mapping[str, Tensor], boxes: Mapping[str, range]) -> dict[str, Sample]:
    held = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    parts = [_middle(tensor) for tensor in held.values()]
    lengths = [part.numel() for part in parts]
    found = torch.cat([part.to(parts[0].device) for part in parts]).cpu().split(lengths)
    rows = {name: (boxes[name].start, boxes[name].stop) if name in boxes else None for name in held}
    return {name: Sample(rows[name], zlib.crc32(bytes(part.tolist()))) for name, part in zip(held, found, strict=True)}


def _middle(tensor: Tensor) -> Tensor:
    """The bytes of some numbers in the middle; of a mapped file it touches a page or two."""
    row = tensor.reshape(1) if tensor.ndim == 0 else tensor
    while row.ndim > 1:
        row = row[len(row) // 2]
    first = max(0, (len(row) - SAMPLED) // 2)
    return row[first : first + SAMPLED].contiguous().view(torch.uint8)


def _differences(everyone: Sequence[Mapping[str, Sample]]) -> dict[str, tuple[int, int]]:
    """Of each tensor that is not the same on two ranks that hold the same rows of it, these ranks."""
    seen: dict[tuple[str, tuple[int, int] | None], tuple[int, int]] = {}
    found: dict[str, tuple[int, int]] = {}
    for rank, samples in enumerate(everyone):
        for name, (rows, number) in samples.items():
            first, expected = seen.setdefault((name, rows), (rank, number))
            if number != expected:
                found.setdefault(name, (first, rank))
    return found
