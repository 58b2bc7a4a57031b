"""A plan narrowed to what one process holds: of some targets only a run of their first axis (experts).  No torch.

Every part says where its box lies in the target and where in the file.  Cut to the run in the target, it says which
bytes of the file are still wanted; what no part wants any more is never read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from moebius.checkpoint.conversion import Conversion, Source
from moebius.checkpoint.operations import Part, Region, narrow_part, swapped
from moebius.checkpoint.planning import Decode, Pack, Plan, Read, Target
from moebius.errors import ArgumentError, Fault

WHOLE: Mapping[str, range] = {}
"""The boxes of a process that holds every target whole."""


def owned(plan: Plan, boxes: Mapping[str, range]) -> Plan:
    """The plan of a process that holds, of each target in `boxes`, only that range of axis 0, and the others whole.

    An empty range is a target of no rows.  Of a weight that is quantized while it is read, the values and the scales
    have the same box.  ArgumentError: boxes that are no range of a target, or that such a plan cannot have; all that
    was found.
    """
    if faults := list(_faults(plan, boxes)):
        raise ArgumentError(f"{plan.files.folder} cannot be read in these boxes", faults=faults)
    reads, decodes = _narrowed(plan.reads, boxes), _narrowed(plan.decodes, boxes)
    packs = tuple(_resized(pack, boxes) for pack in _narrowed(plan.packs, boxes))
    kept = {way.info.name for way in (*reads, *decodes, *packs)}
    keys = {key for key, info in plan.stored.items() if info.name in kept}
    conversions = (_of_keys(conversion, keys) for conversion in plan.conversions)
    return replace(
        plan,
        targets={name: _held(target, boxes) for name, target in plan.targets.items()},
        conversions=tuple(conversion for conversion in conversions if conversion.keys),
        reads=reads,
        decodes=decodes,
        packs=packs,
    )


def within(parts: Iterable[Part], boxes: Mapping[str, range]) -> tuple[Part, ...]:
    """What of the parts lies in their targets' boxes, each `origin` counted from its box's start."""
    found = (_inside(part, boxes[part.name]) if part.name in boxes else part for part in parts)
    return tuple(part for part in found if part)


def shape_within(shape: tuple[int, ...], box: range | None) -> tuple[int, ...]:
    """Of the rows of a tensor that are in a box; None: all."""
    return shape if box is None else (len(box), *shape[1:])


def fits(box: range, shape: tuple[int, ...]) -> bool:
    """Is it a run of the first axis?"""
    return bool(shape) and box.step == 1 and 0 <= box.start <= box.stop <= shape[0]


# --- the ways of a plan ----------------------------------------------------------------------------------------------

Way = TypeVar("Way", Read, Decode, Pack)


def _narrowed(ways: Iterable[Way], boxes: Mapping[str, range]) -> tuple[Way, ...]:
    found = ((way, within(way.parts, boxes)) for way in ways)
    return tuple(replace(way, parts=parts) for way, parts in found if parts or not way.parts)


def _inside(part: Part, box: range) -> Part | None:
    found = _within(part.shape, part.origin, part.place, box.start, len(box))
    return found and Part(part.name, *found)


@lru_cache(maxsize=1 << 14)  # layers are alike
def _within(
    shape: tuple[int, ...], origin: Region, place: Region, start: int, size: int
) -> tuple[tuple[int, ...], Region, Region] | None:
    """(shape, origin, place) of what of a part has its origin in [start, start + size) of axis 0; None: nothing."""
    found = narrow_part(swapped(Part("", shape, origin, place)), 0, start, size)
    return swapped(found)[1:] if found else None


def _resized(pack: Pack, boxes: Mapping[str, range]) -> Pack:
    return replace(pack, shape=shape_within(pack.shape, boxes.get(pack.name)))


def _held(target: Target, boxes: Mapping[str, range]) -> Target:
    return replace(target, shape=shape_within(target.shape, boxes.get(target.name)))


def _of_keys(conversion: Conversion, keys: set[str]) -> Conversion:
    """Of its sources, those that are still read."""

    def kept(group: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source for source in group if source.key in keys)

    return replace(conversion, sources=tuple(map(kept, conversion.sources)))


# --- boxes that a plan cannot have -----------------------------------------------------------------------------------


def _faults(plan: Plan, boxes: Mapping[str, range]) -> Iterator[Fault]:
    for name, box in boxes.items():
        if name not in plan.targets:
            yield Fault(name, "unknown", "the plan has no such target")
        elif not fits(box, shape := plan.targets[name].shape):
            yield Fault(name, "no run of its first axis", f"found {box}, of shape {list(shape)}")
    for name in dict.fromkeys(name for _, name in plan.doubles if name in boxes):
        yield Fault(name, "tied and stored twice", "the second copy is compared with the whole of it")
    shared = {pack.name: pack for pack in plan.packs if {pack.name, pack.scale_name} & boxes.keys()}
    for name, pack in shared.items():
        if len(pack.shape) < 3:
            yield Fault(name, "rows share scales", f"a quantized weight of shape {list(pack.shape)} has no first axis")
        elif boxes.get(name) != boxes.get(pack.scale_name):
            found = f"values in {boxes.get(name)}, scales in {boxes.get(pack.scale_name)}"
            yield Fault(name, "values and scales apart", found)
