"""Operations on layouts: which element of a source tensor lands where in a target tensor, as strided boxes.  No torch.

A Layout is a tensor's shape and the Parts that fill it.  A Part pairs two Regions of equal shape: one of this tensor
(`place`), one of an origin tensor.  An operation rearranges layouts and never touches data; a chain of operations so
composes to one Part a tensor, and a byte is copied once.  Every operation has an inverse, which is why the same chain
loads and saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol


class LayoutError(ValueError):
    """An operation cannot be applied to these shapes."""


class Region(NamedTuple):
    """A strided box of a tensor: element (i_0, ..., i_n) of the box lies at start + sum_d i_d * steps[d] on axes[d].

    start: an index an axis of the tensor.  axes, steps: one a dimension of the box.
    """

    start: tuple[int, ...]
    axes: tuple[int, ...]
    steps: tuple[int, ...]

    @staticmethod
    def whole(rank: int) -> "Region":
        return Region((0,) * rank, tuple(range(rank)), (1,) * rank)

    def strided(self, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """(offset, strides) in elements, if a contiguous tensor of `shape` is what the region lies in."""
        unit = contiguous_strides(shape)
        offset = sum(index * stride for index, stride in zip(self.start, unit, strict=True))
        return offset, tuple(step * unit[axis] for axis, step in zip(self.axes, self.steps, strict=True))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


class Part(NamedTuple):
    """`shape` elements of the tensor `name` at `origin`, which lie at `place` in the tensor whose layout holds this."""

    name: str
    shape: tuple[int, ...]
    origin: Region
    place: Region


class Layout(NamedTuple):
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @staticmethod
    def whole(name: str, shape: Sequence[int]) -> "Layout":
        region = Region.whole(len(shape))
        return Layout(tuple(shape), (Part(name, tuple(shape), region, region),))


Groups = list[list[Layout]]  # one list a pattern; within it, one layout an index of the pattern's last `*`


class Operation(Protocol):
    """apply: groups in, groups out; `outputs` is how many patterns the result has.  inverse: undoes it.

    sized: the same operation, with what its inverse needs to know taken from the shapes that go in.
    """

    def apply(self, groups: Groups, outputs: int) -> Groups: ...

    def inverse(self) -> "Operation": ...

    def sized(self, groups: Groups) -> "Operation": ...


@dataclass(frozen=True)
class _Sizeless:
    dim: int = 0

    def sized(self, groups: Groups) -> "Operation":
        return self  # type: ignore[return-value]  # every heir is an Operation


@dataclass(frozen=True)
class MergeModulelist(_Sizeless):
    """Stacks the tensors of each pattern, by their index, along a new axis `dim`: E of [I, H] -> [E, I, H]."""

    def apply(self, groups: Groups, outputs: int) -> Groups:
        return [[_stack(group, self.dim)] for group in groups]

    def inverse(self) -> "SplitModulelist":
        return SplitModulelist(self.dim)


@dataclass(frozen=True)
class SplitModulelist(_Sizeless):
    """Takes each tensor apart along the axis `dim`, which goes: [E, I, H] -> E of [I, H]."""

    def apply(self, groups: Groups, outputs: int) -> Groups:
        return [
            [_select(layout, self.dim, index) for layout in group for index in range(_size(layout, self.dim))]
            for group in groups
        ]

    def inverse(self) -> MergeModulelist:
        return MergeModulelist(self.dim)


@dataclass(frozen=True)
class Concatenate:
    """Joins the patterns' tensors along `dim`, in the patterns' order: [E, I, H], [E, I, H] -> [E, 2I, H]."""

    dim: int = 0
    sizes: tuple[int, ...] | None = None

    def apply(self, groups: Groups, outputs: int) -> Groups:
        return [[_join(list(layouts), self.dim) for layouts in zip(*groups, strict=True)]]

    def inverse(self) -> "Chunk":
        return Chunk(self.dim, self.sizes)

    def sized(self, groups: Groups) -> "Concatenate":
        return replace(self, sizes=self.sizes or tuple(_size(group[0], self.dim) for group in groups))


@dataclass(frozen=True)
class Chunk:
    """Cuts a tensor along `dim`, one piece a target pattern: equal ones, or of the given `sizes`."""

    dim: int = 0
    sizes: tuple[int, ...] | None = None

    def apply(self, groups: Groups, outputs: int) -> Groups:
        (group,) = groups
        cut = [self._cut(layout, outputs) for layout in group]
        return [list(pieces) for pieces in zip(*cut, strict=True)]

    def inverse(self) -> Concatenate:
        return Concatenate(self.dim, self.sizes)

    def sized(self, groups: Groups) -> "Chunk":
        return self

    def _cut(self, layout: Layout, outputs: int) -> list[Layout]:
        total = _size(layout, self.dim)
        sizes = self.sizes or (total // outputs,) * outputs
        if len(sizes) != outputs or sum(sizes) != total:
            raise LayoutError(f"an axis of {total} cannot be cut into {outputs} pieces of {list(sizes)}")
        starts = [sum(sizes[:index]) for index in range(outputs)]
        return [_narrow(layout, self.dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@dataclass(frozen=True)
class Transpose:
    """Swaps two axes."""

    dim0: int = 0
    dim1: int = 1

    def apply(self, groups: Groups, outputs: int) -> Groups:
        return [[_swap(layout, self.dim0, self.dim1) for layout in group] for group in groups]

    def inverse(self) -> "Transpose":
        return self

    def sized(self, groups: Groups) -> "Transpose":
        return self


@dataclass(frozen=True)
class Interleave(_Sizeless):
    """Halves to alternating rows along `dim`: [a0 a1 .. b0 b1 ..] -> [a0 b0 a1 b1 ..]; undo=True the other way."""

    dim: int = 0
    undo: bool = False

    def apply(self, groups: Groups, outputs: int) -> Groups:
        rearrange = _deinterleave if self.undo else _interleave
        return [[rearrange(layout, self.dim) for layout in group] for group in groups]

    def inverse(self) -> "Interleave":
        return Interleave(self.dim, not self.undo)


def forward(operations: Sequence[Operation], groups: Groups, outputs: int) -> Groups:
    """Applies a chain; the last operation that makes patterns out of one makes `outputs` of them."""
    for operation in operations:
        groups = operation.apply(groups, outputs)
    return groups


def inverse(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    return tuple(operation.inverse() for operation in reversed(operations))


def with_sizes(operations: Sequence[Operation], groups: Groups, outputs: int) -> tuple[Operation, ...]:
    """The chain with its sizes filled in from one representative layout a pattern."""
    chain = []
    for operation in operations:
        chain.append(operation.sized(groups))
        groups = operation.apply(groups, outputs)
    return tuple(chain)


# --- the algebra: each takes layouts apart or puts them together ----------------------------------------------------


def _size(layout: Layout, axis: int) -> int:
    if not 0 <= axis < len(layout.shape):
        raise LayoutError(f"no axis {axis} in a tensor of shape {list(layout.shape)}")
    return layout.shape[axis]


def _stack(layouts: Sequence[Layout], axis: int) -> Layout:
    shapes = {layout.shape for layout in layouts}
    if len(shapes) != 1:
        raise LayoutError(f"tensors of different shapes cannot be stacked: {sorted(shapes)}")
    (shape,) = shapes
    if not 0 <= axis <= len(shape):
        raise LayoutError(f"no place for a new axis {axis} in shape {list(shape)}")
    parts = [_with_axis(part, axis, index) for index, layout in enumerate(layouts) for part in layout.parts]
    return Layout((*shape[:axis], len(layouts), *shape[axis:]), tuple(parts))


def _with_axis(part: Part, axis: int, index: int) -> Part:
    place = part.place
    start = (*place.start[:axis], index, *place.start[axis:])
    axes = tuple(old + (old >= axis) for old in place.axes)
    return _at(part, Region(start, axes, place.steps))


def _at(part: Part, place: Region) -> Part:
    """The part at another place."""
    return Part(part.name, part.shape, part.origin, place)


def _select(layout: Layout, axis: int, index: int) -> Layout:
    """The layout at one index of an axis, without the axis."""
    parts = tuple(kept for part in layout.parts if (kept := _select_part(part, axis, index)))
    return Layout((*layout.shape[:axis], *layout.shape[axis + 1 :]), parts)


def _select_part(part: Part, axis: int, index: int) -> Part | None:
    """What of a part lies at one index of an axis, without the axis; None if nothing does."""
    name, shape, origin, place = part
    start = (*place.start[:axis], *place.start[axis + 1 :])
    if axis not in place.axes:
        axes = tuple(old - (old > axis) for old in place.axes)
        return Part(name, shape, origin, Region(start, axes, place.steps)) if place.start[axis] == index else None
    dim = place.axes.index(axis)
    at, between = divmod(index - place.start[axis], place.steps[dim])
    if between or not 0 <= at < shape[dim]:
        return None
    axes = tuple(old - (old > axis) for old in _without(place.axes, dim))
    moved = _moved(origin, origin.axes[dim], at * origin.steps[dim]).start
    there = Region(moved, _without(origin.axes, dim), _without(origin.steps, dim))
    return Part(name, _without(shape, dim), there, Region(start, axes, _without(place.steps, dim)))


def _without(numbers: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return numbers[:dim] + numbers[dim + 1 :]


def _narrow(layout: Layout, axis: int, start: int, size: int) -> Layout:
    parts = [kept for part in layout.parts if (kept := narrow_part(part, axis, start, size))]
    return Layout((*layout.shape[:axis], size, *layout.shape[axis + 1 :]), tuple(parts))


def narrow_part(part: Part, axis: int, start: int, size: int) -> Part | None:
    """What of a part lies in [start, start + size) of an axis, counted from `start`; None if nothing does."""
    at = part.place.start[axis] - start
    if axis not in part.place.axes:
        return _at(part, _moved(part.place, axis, -start)) if 0 <= at < size else None
    dim = part.place.axes.index(axis)
    step = part.place.steps[dim]
    first = max(0, -(at // step))
    count = min(part.shape[dim], -((at - size) // step)) - first
    if count <= 0:
        return None
    shape = (*part.shape[:dim], count, *part.shape[dim + 1 :])
    origin = _moved(part.origin, part.origin.axes[dim], first * part.origin.steps[dim])
    return Part(part.name, shape, origin, _moved(part.place, axis, first * step - start))


def swapped(part: Part) -> Part:
    """The part seen from the other side: its place is what was its origin."""
    return Part(part.name, part.shape, part.place, part.origin)


def _moved(region: Region, axis: int, by: int) -> Region:
    start = (*region.start[:axis], region.start[axis] + by, *region.start[axis + 1 :])
    return Region(start, region.axes, region.steps)


def _join(layouts: Sequence[Layout], axis: int) -> Layout:
    sizes = [_size(layout, axis) for layout in layouts]
    rests = {(*layout.shape[:axis], *layout.shape[axis + 1 :]) for layout in layouts}
    if len(rests) != 1:
        raise LayoutError(f"shapes {[list(layout.shape) for layout in layouts]} cannot be joined along axis {axis}")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [
        _at(part, _moved(part.place, axis, start))
        for layout, start in zip(layouts, starts, strict=True)
        for part in layout.parts
    ]
    shape = (*layouts[0].shape[:axis], sum(sizes), *layouts[0].shape[axis + 1 :])
    return Layout(shape, tuple(parts))


def _swap(layout: Layout, axis0: int, axis1: int) -> Layout:
    order = list(range(len(layout.shape)))
    for axis in (axis0, axis1):
        _size(layout, axis)
    order[axis0], order[axis1] = axis1, axis0
    parts = [
        _at(
            part,
            Region(
                tuple(part.place.start[axis] for axis in order),
                tuple(order[axis] for axis in part.place.axes),
                part.place.steps,
            ),
        )
        for part in layout.parts
    ]
    return Layout(tuple(layout.shape[axis] for axis in order), tuple(parts))


def _interleave(layout: Layout, axis: int) -> Layout:
    half = _half(layout, axis)
    return _spread(layout, [_narrow(layout, axis, 0, half), _narrow(layout, axis, half, half)], axis)


def _spread(layout: Layout, halves: Sequence[Layout], axis: int) -> Layout:
    parts = [_stretched(part, axis, shift) for shift, part_of in enumerate(halves) for part in part_of.parts]
    return Layout(layout.shape, tuple(parts))


def _stretched(part: Part, axis: int, shift: int) -> Part:
    """Row i of the axis goes to row 2 * i + shift."""
    place = _moved(part.place, axis, part.place.start[axis] + shift)
    steps = tuple(step * (2 if at == axis else 1) for step, at in zip(place.steps, place.axes, strict=True))
    return _at(part, Region(place.start, place.axes, steps))


def _deinterleave(layout: Layout, axis: int) -> Layout:
    half = _half(layout, axis)
    parts = [
        _at(row, _moved(row.place, axis, shift * half))
        for shift in (0, 1)
        for part in layout.parts
        if (row := _every_other(part, axis, shift))
    ]
    return Layout(layout.shape, tuple(parts))


def _half(layout: Layout, axis: int) -> int:
    size = _size(layout, axis)
    if size % 2:
        raise LayoutError(f"an axis of {size} has no halves")
    return size // 2


def _every_other(part: Part, axis: int, shift: int) -> Part | None:
    """What of a part lies on rows 2 * i + shift of an axis, as row i; None if nothing does."""
    at = part.place.start[axis]
    if axis not in part.place.axes:
        return _at(part, _moved(part.place, axis, at // 2 - at)) if at % 2 == shift else None
    dim = part.place.axes.index(axis)
    step, count = part.place.steps[dim], part.shape[dim]
    if step % 2 == 0:  # the part lies on one of the two kinds of rows
        steps = (*part.place.steps[:dim], step // 2, *part.place.steps[dim + 1 :])
        place = Region(_moved(part.place, axis, at // 2 - at).start, part.place.axes, steps)
        return _at(part, place) if at % 2 == shift else None
    first = (at + shift) % 2
    kept = -((first - count) // 2)
    if kept <= 0:
        return None
    row = at + first * step
    place = _moved(part.place, axis, row // 2 - at)
    origin = _moved(part.origin, part.origin.axes[dim], first * part.origin.steps[dim])
    origin_steps = (*origin.steps[:dim], origin.steps[dim] * 2, *origin.steps[dim + 1 :])
    shape = (*part.shape[:dim], kept, *part.shape[dim + 1 :])
    return Part(part.name, shape, Region(origin.start, origin.axes, origin_steps), place)
