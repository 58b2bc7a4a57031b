"""Is every element of every target written exactly once?  An independent check of a finished plan.  No torch."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from moebius.checkpoint.operations import Part, Region
from moebius.errors import Fault

Span = tuple[int, int, int]  # start, step, count of a box along one axis


def uncovered(shapes: Mapping[str, Sequence[int]], parts: Iterable[Part]) -> list[Fault]:
    """A fault for each tensor of `shapes` that the parts' origins do not cover exactly once."""
    boxes: dict[str, list[tuple[Span, ...]]] = defaultdict(list)
    for part in parts:
        boxes[part.name].append(_spans(part.origin, part.shape))
    wrongs = ((name, _check(tuple(shape), tuple(boxes[name]))) for name, shape in shapes.items())
    return [Fault(name, "not covered once", wrong) for name, wrong in wrongs if wrong]


@lru_cache(maxsize=1 << 10)
def _check(shape: tuple[int, ...], boxes: tuple[tuple[Span, ...], ...]) -> str:
    """What is wrong with the boxes of a tensor; empty if nothing is."""
    volume = sum(math.prod(count for _, _, count in box) for box in boxes)
    if volume != math.prod(shape):
        return f"{math.prod(shape)} elements, {volume} would be written"
    if any(
        start < 0 or start + step * (count - 1) >= size
        for box in boxes
        for (start, step, count), size in zip(box, shape, strict=True)
    ):
        return "a part reaches outside the tensor"
    return "two parts overlap" if _overlap(list(boxes), 0) else ""


@lru_cache(maxsize=1 << 15)  # layers are alike
def _spans(origin: Region, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """The box of a part's origin, axis by axis; an axis that the part does not run along holds one index."""
    spans = [(index, 1, 1) for index in origin.start]
    for axis, step, count in zip(origin.axes, origin.steps, shape, strict=True):
        spans[axis] = (origin.start[axis], step, count)
    return tuple(spans)


def _overlap(boxes: list[tuple[Span, ...]], axis: int) -> bool:
    """Boxes are disjoint if on some axis their spans are; equal spans are told apart by the next axis."""
    if len(boxes) < 2:
        return False
    if axis == len(boxes[0]):
        return True
    classes: dict[Span, list[tuple[Span, ...]]] = defaultdict(list)
    for box in boxes:
        classes[box[axis]].append(box)
    if any(_overlap(same, axis + 1) for same in classes.values()):
        return True
    return any(_overlap([*classes[a], *classes[b]], axis + 1) for a, b in _meeting(list(classes)))


def _meeting(spans: list[Span]) -> list[tuple[Span, Span]]:
    """The pairs of different spans that share an index, found by a sweep from low to high."""
    pairs, open_spans = [], []
    for span in sorted(spans):
        open_spans = [other for other in open_spans if _last(other) >= span[0]]
        pairs += [(other, span) for other in open_spans if _share(other, span)]
        open_spans.append(span)
    return pairs


def _last(span: Span) -> int:
    start, step, count = span
    return start + step * (count - 1)


def _share(a: Span, b: Span) -> bool:
    """Do two arithmetic progressions meet?  Exact: the shorter one is walked when both have steps."""
    if a[1] == b[1] == 1:
        return a[0] <= _last(b) and b[0] <= _last(a)
    short, long = sorted((a, b), key=lambda span: span[2])
    members = range(short[0], _last(short) + 1, short[1])
    return any(long[0] <= index <= _last(long) and (index - long[0]) % long[1] == 0 for index in members)
