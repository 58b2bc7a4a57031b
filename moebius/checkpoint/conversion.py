"""One rule at one place in the model: which keys it needs, of which shapes, and where each of them goes.  No torch.

Everything is derived from the targets: the inverse chain of the rule's operations, applied to the whole target
tensors, gives one layout for each source key.  So what must be in the files is known before looking into them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from moebius.checkpoint.converter import Match, WeightConverter
from moebius.checkpoint.operations import Layout, LayoutError, Operation, Part, forward, inverse, with_sizes


@dataclass(frozen=True)
class Source:
    """A key that a conversion needs.  index: its place in the merged list, None outside one."""

    key: str
    index: int | None
    layout: Layout


@dataclass(frozen=True)
class Conversion:
    """rule: None for a tensor that is copied under its own name.  sources: one list a source pattern."""

    rule: WeightConverter | None
    targets: tuple[str, ...]
    sources: tuple[tuple[Source, ...], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(source.key for group in self.sources for source in group)


def copied(target: str, shape: Sequence[int], key: str) -> Conversion:
    """The conversion of a tensor that is taken as it is."""
    return Conversion(None, (target,), ((Source(key, None, Layout.whole(target, shape)),),))


def expand(
    rule: WeightConverter, match: Match, shapes: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]
) -> Conversion:
    """The conversion of `rule` at `match`.

    shapes: of all targets.  stored: of the keys in the files, asked only for the sizes of unequal concatenations.
    Raises LayoutError if the targets' shapes do not admit the operations.
    """
    names = [_target_names(rule, pattern, match, shapes) for pattern in range(len(rule.targets))]
    absent = [name for group in names for name in group if name not in shapes]
    if absent:
        raise LayoutError(f"the model has no parameter {absent[0]}")
    targets = tuple(name for group in names for name in group)
    pulled = _pull(rule, match, tuple(tuple(tuple(shapes[name]) for name in group) for group in names), stored)
    sources = tuple(_sources(rule, pattern, match, group, targets) for pattern, group in enumerate(pulled))
    return Conversion(rule, targets, sources)


def _target_names(rule: WeightConverter, pattern: int, match: Match, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    fill = rule.targets[pattern].fill
    if rule.merged >= 0:
        return [fill(match.prefix, match.indices)]
    names = []
    for index in count():
        name = fill(match.prefix, (*match.indices, index))
        if name not in shapes and names:
            return names
        names.append(name)
        if name not in shapes:
            return names
    raise AssertionError("count() does not end")


Shapes = tuple[tuple[tuple[int, ...], ...], ...]  # of the targets, one tuple a pattern


def _pull(
    rule: WeightConverter, match: Match, shapes: Shapes, stored: Mapping[str, Sequence[int]]
) -> list[list[Layout]]:
    """The sources' layouts; unequal parts of a concatenation take their sizes from the stored tensors, if they fit."""
    sample = _sample(rule, match, stored)
    if sample:
        try:
            sized = with_sizes(rule.operations, sample, len(rule.targets))
            return _pulled(sized, shapes, len(rule.sources))
        except LayoutError:
            pass  # a stored shape is wrong: go on with equal parts, so that the fault is reported at its key
    return _pulled(rule.operations, shapes, len(rule.sources))


@lru_cache(maxsize=256)
def _pulled(operations: tuple[Operation, ...], shapes: Shapes, outputs: int) -> list[list[Layout]]:
    """As `_pull`; the targets are called 0, 1, ..., so that the many layers of a model share their boxes."""
    numbers = map(str, count())
    layouts = [[Layout.whole(next(numbers), shape) for shape in group] for group in shapes]
    return forward(inverse(operations), layouts, outputs)


def _sample(rule: WeightConverter, match: Match, stored: Mapping[str, Sequence[int]]) -> list[list[Layout]] | None:
    indices = (*match.indices, 0) if rule.merged > 0 else match.indices
    keys = [pattern.fill(match.prefix, indices) for pattern in rule.sources]
    return [[Layout.whole(key, stored[key])] for key in keys] if all(key in stored for key in keys) else None


def _sources(
    rule: WeightConverter, pattern: int, match: Match, group: Sequence[Layout], targets: Sequence[str]
) -> tuple[Source, ...]:
    fill = rule.sources[pattern].fill
    named = [_named(layout, targets) for layout in group]
    if rule.merged <= 0:
        (layout,) = named
        return (Source(fill(match.prefix, match.indices), None, layout),)
    return tuple(
        Source(fill(match.prefix, (*match.indices, index)), index, layout) for index, layout in enumerate(named)
    )


def _named(layout: Layout, targets: Sequence[str]) -> Layout:
    """The layout with its targets' names instead of their numbers."""
    parts = tuple([Part(targets[int(part.name)], part.shape, part.origin, part.place) for part in layout.parts])
    return Layout(layout.shape, parts)
