"""Cuts a part into blocks whose stored bytes are one short run of the file, for what cannot be read into place.

No torch: a block is offsets and strides, in elements.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moebius.checkpoint.operations import Part, contiguous_strides


@dataclass(frozen=True, slots=True)
class Block:
    """`shape` elements: in the file a span of `length` elements from `start`, in which they lie at `stored_strides`;
    in the target at `offset` with `strides`.
    """

    shape: tuple[int, ...]
    start: int
    length: int
    stored_strides: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def whole_block(part: Part, stored: Sequence[int], target: Sequence[int]) -> Block:
    """The part as one block.  stored, target: the shapes of the two tensors it connects."""
    start, stored_strides = part.place.strided(stored)
    offset, strides = part.origin.strided(target)
    return Block(part.shape, start, _span(part.shape, stored_strides), stored_strides, offset, strides)


def is_run(block: Block) -> bool:
    """Contiguous on both sides: the bytes can go straight from one to the other."""
    dense = [(size, stride) for size, stride in zip(block.shape, contiguous_strides(block.shape), strict=True)]
    return all(
        size == 1 or (stored == stride and strided == stride)
        for (size, stride), stored, strided in zip(dense, block.stored_strides, block.strides, strict=True)
    )


def cut(block: Block, limit: int) -> Iterator[Block]:
    """The block in pieces that each span at most `limit` elements of the file, in the file's order."""
    if block.length <= limit or max(block.shape, default=1) <= 1:
        yield block
        return
    outer = [dim for dim, size in enumerate(block.shape) if size > 1]
    dim = max(outer, key=lambda dim: block.stored_strides[dim])
    rows = max(1, _rows_within(block, dim, limit))
    for first in range(0, block.shape[dim], rows):
        yield from cut(_rows(block, dim, first, min(rows, block.shape[dim] - first)), limit)


def _rows_within(block: Block, dim: int, limit: int) -> int:
    """How many steps along `dim` fit into a span of `limit` elements."""
    one = block.length - (block.shape[dim] - 1) * block.stored_strides[dim]
    return 1 + (limit - one) // block.stored_strides[dim] if one <= limit else 1


def _rows(block: Block, dim: int, first: int, count: int) -> Block:
    shape = (*block.shape[:dim], count, *block.shape[dim + 1 :])
    start = block.start + first * block.stored_strides[dim]
    offset = block.offset + first * block.strides[dim]
    return Block(shape, start, _span(shape, block.stored_strides), block.stored_strides, offset, block.strides)


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
