"""Quantized weights, decoded while they are read: a few rows at a time, straight into their place."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import torch

from moebius.checkpoint.blocks import whole_block
from moebius.checkpoint.encodings import Encoded
from moebius.checkpoint.files import ITEM_BYTES, TensorInfo
from moebius.checkpoint.operations import Part, narrow_part
from moebius.checkpoint.planning import STAGING_BYTES, Decode
from moebius.checkpoint.quantizing import span
from moebius.quantization.decoding import dequantize

ReadInto = Callable[[TensorInfo, memoryview, int], None]
"""Fills the memory from a stored tensor, beginning so many bytes after its start."""


def read_decoded(decode: Decode, tensors: Mapping[str, torch.Tensor], read_into: ReadInto) -> None:
    """Decodes one stored weight [..., out, in] into the places of its parts; a place of another float is cast to.

    Of the stored bytes, rows between those that a part takes are read as well, others are not.
    """
    weight = decode.info
    *lead, _, width = weight.shape
    for matrix, index in enumerate(product(*map(range, lead))):
        parts = _inside(decode.parts, index, (1,) * len(index))
        for first, count in _chunks(weight, parts):
            slab = decoded_rows(weight, matrix, first, count, read_into)
            _put(slab.view(*(1 for _ in lead), count, width), (*index, first), decode.parts, tensors)


def decoded_rows(weight: Encoded, matrix: int, first: int, count: int, read_into: ReadInto) -> torch.Tensor:
    """Rows of one matrix [out, in] of a stored weight, in float32: whole quanta, the last of which may be partial."""
    lead, quantum = len(weight.shape) - 2, weight.form.quantum_rows
    values = _rows(weight.values, lead, matrix, first, count, read_into)
    scales = _rows(weight.scales, lead, matrix, first // quantum, math.ceil(count / quantum), read_into)
    return dequantize(weight.form, values, scales, torch.float32)


def _chunks(weight: Encoded, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """(first, count) of a matrix's rows that are decoded at once: whole quanta, about a staging buffer of stored bytes,
    from the first to the last row in which a part lies.
    """
    lead, quantum, rows = len(weight.shape) - 2, weight.form.quantum_rows, weight.shape[-2]
    spans = [span(part.place, part.shape, lead) for part in parts]
    begin = min((start for start, _, _ in spans), default=0) // quantum * quantum
    last = max((start + step * (count - 1) for start, step, count in spans), default=-1)
    step = max(1, STAGING_BYTES // max(1, _row_bytes(weight.values, lead)) // quantum) * quantum
    end = min(rows, math.ceil((last + 1) / quantum) * quantum)
    return ((first, min(step, end - first)) for first in range(begin, end, step))


def _row_bytes(info: TensorInfo, lead: int) -> int:
    return math.prod(info.shape[lead + 1 :]) * ITEM_BYTES[info.dtype]


def _rows(info: TensorInfo, lead: int, matrix: int, first: int, count: int, read_into: ReadInto) -> torch.Tensor:
    """Rows of one matrix of a stored tensor [..., rows, ...], without the leading axes."""
    rows = torch.empty((count, *info.shape[lead + 1 :]), dtype=getattr(torch, info.dtype))
    start = (matrix * info.shape[lead] + first) * _row_bytes(info, lead)
    read_into(info, memoryview(rows.view(-1).view(torch.uint8).numpy()), start)  # pyright: ignore[reportArgumentType]
    return rows


def _put(slab: torch.Tensor, at: Sequence[int], parts: Sequence[Part], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies what of the slab, which lies `at` these indices of the weight, belongs to each part."""
    for part in _inside(parts, at, slab.shape):
        target = tensors[part.name]
        block = whole_block(part, slab.shape, target.shape)
        found = slab.as_strided(block.shape, block.stored_strides, block.start)
        target.as_strided(block.shape, block.strides, block.offset).copy_(found)


def _inside(parts: Sequence[Part], at: Sequence[int], shape: Sequence[int]) -> list[Part]:
    """What of the parts lies in a box, `at` these indices of the weight's first axes, with places counted from it."""
    for axis, start in enumerate(at):
        found = (narrow_part(part, axis, start, shape[axis]) for part in parts)
        parts = [part for part in found if part]
    return list(parts)
