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
from moebius.quantization.decoding import dequantize

ReadInto = Callable[[TensorInfo, memoryview, int], None]
"""Fills the memory from a stored tensor, beginning so many bytes after its start."""


def read_decoded(decode: Decode, tensors: Mapping[str, torch.Tensor], read_into: ReadInto) -> None:
    """Decodes one stored weight [..., out, in] into the places of its parts; a place of another float is cast to."""
    weight = decode.info
    *lead, rows, width = weight.shape
    for matrix, index in enumerate(product(*map(range, lead))):
        for first, count in _chunks(weight.values, rows, len(lead), weight.form.quantum_rows):
            slab = decoded_rows(weight, matrix, first, count, read_into)
            _put(slab.view(*(1 for _ in lead), count, width), (*index, first), decode.parts, tensors)


def decoded_rows(weight: Encoded, matrix: int, first: int, count: int, read_into: ReadInto) -> torch.Tensor:
    """Rows of one matrix [out, in] of a stored weight, in float32: whole quanta, the last of which may be partial."""
    lead, quantum = len(weight.shape) - 2, weight.form.quantum_rows
    values = _rows(weight.values, lead, matrix, first, count, read_into)
    scales = _rows(weight.scales, lead, matrix, first // quantum, math.ceil(count / quantum), read_into)
    return dequantize(weight.form, values, scales, torch.float32)


def _chunks(values: TensorInfo, rows: int, lead: int, quantum: int) -> Iterator[tuple[int, int]]:
    """(first, count) of rows that are decoded at once: whole quanta, about a staging buffer of stored bytes."""
    nbytes = max(1, _row_bytes(values, lead))
    step = max(1, STAGING_BYTES // nbytes // quantum) * quantum
    return ((first, min(step, rows - first)) for first in range(0, rows, step))


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
    for part in parts:
        inside: Part | None = part
        for axis, start in enumerate(at):
            inside = inside and narrow_part(inside, axis, start, slab.shape[axis])
        if inside is not None:
            target = tensors[inside.name]
            block = whole_block(inside, slab.shape, target.shape)
            found = slab.as_strided(block.shape, block.stored_strides, block.start)
            target.as_strided(block.shape, block.strides, block.offset).copy_(found)
