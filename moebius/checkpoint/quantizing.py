"""A plan for plain weights made into one that quantizes some of them while they are read.  No torch.

The plan has shown that every element of a weight comes from one place in the files.  What is left to show here is that
each stored piece of it holds whole quanta, rows or blocks of rows that share scales: then it can be quantized by
itself, to the bits that the whole weight would have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moebius.checkpoint.operations import Part, Region
from moebius.checkpoint.planning import Decode, Pack, Plan, Read, Target
from moebius.errors import ArgumentError, Fault
from moebius.quantization.forms import Form


@dataclass(frozen=True)
class Packing:
    """How a weight [..., out, in] is to be quantized; segments: matrices stacked on `out`, whose scales begin anew."""

    form: Form
    segments: int = 1


def quantized(plan: Plan, weights: Mapping[str, Packing]) -> Plan:
    """The same plan, with these of its targets quantized: values under the weight's name, scales at <name>_scale.

    ArgumentError: weights that are stored in that form already, or in pieces that cut through what shares a scale; all
    that was found.
    """
    ways = (*plan.reads, *plan.decodes)
    packs = tuple(pack for way in ways for pack in _packs(way, weights, plan.targets))
    if faults := list(dict.fromkeys(fault for pack in packs for fault in _faults(pack))):
        raise ArgumentError(
            f"{plan.files.folder} cannot be quantized while it is read; no weight was read",
            faults=faults,
            advice="leave the weights plain by modules_to_not_convert=[...]",
        )
    rest = [kept for way in ways if (kept := _without(way, weights))]
    return replace(
        plan,
        targets={target.name: target for name in plan.targets for target in _targets(plan.targets[name], weights)},
        reads=tuple(way for way in rest if isinstance(way, Read)),
        decodes=tuple(way for way in rest if isinstance(way, Decode)),
        packs=_in_file_order(plan, packs),
    )


def _targets(target: Target, weights: Mapping[str, Packing]) -> Iterator[Target]:
    packing = weights.get(target.name)
    if packing is None:
        yield target
        return
    values, scales = packing.form.values(target.shape), packing.form.scales(target.shape, packing.segments)
    yield Target(target.name, values.shape, values.dtype)
    yield Target(f"{target.name}_scale", scales.shape, scales.dtype)


def _packs(way: Read | Decode, weights: Mapping[str, Packing], targets: Mapping[str, Target]) -> Iterator[Pack]:
    for name in dict.fromkeys(part.name for part in way.parts if part.name in weights):
        parts = tuple(part for part in way.parts if part.name == name)
        packing = weights[name]
        yield Pack(way.info, parts, name, targets[name].shape, packing.form, packing.segments)


def _without(way: Read | Decode, weights: Mapping[str, Packing]) -> Read | Decode | None:
    parts = tuple(part for part in way.parts if part.name not in weights)
    return replace(way, parts=parts) if parts or not way.parts else None


def _in_file_order(plan: Plan, packs: Sequence[Pack]) -> tuple[Pack, ...]:
    order = {shard.path.name: number for number, shard in enumerate(plan.files.shards)}
    return tuple(sorted(packs, key=lambda pack: (order[pack.info.file], pack.info.offset)))


# --- whole quanta ------------------------------------------------------------------------------------------------


def runs_of_rows(pack: Pack, part: Part) -> Iterator[tuple[int, int, int]]:
    """(first, count, segment) of the weight's rows that the part fills, cut at the segments' borders."""
    height = pack.shape[-2] // pack.segments
    start, _, count = span(part.origin, part.shape, len(pack.shape) - 2)
    for segment in range(start // height, -(-(start + count) // height)):
        first, end = max(start, segment * height), min(start + count, (segment + 1) * height)
        yield first, end - first, segment


def span(region: Region, shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """(start, step, count) of a region's box on one axis of the tensor it lies in."""
    if axis not in region.axes:
        return region.start[axis], 1, 1
    dim = region.axes.index(axis)
    return region.start[axis], region.steps[dim], shape[dim]


def _faults(pack: Pack) -> Iterator[Fault]:
    if pack.info.dtype == pack.form.name:
        yield Fault(pack.info.name, f"stored as {pack.form.name}", "it is quantized already: leave quantization out")
    elif not all(_whole_quanta(pack, part) for part in pack.parts):
        detail = f"{pack.form.name} takes whole rows of {pack.name}, {pack.form.quantum_rows} at a time"
        yield Fault(pack.info.name, "cut through what shares a scale", detail)


def _whole_quanta(pack: Pack, part: Part) -> bool:
    *_, rows, width = pack.shape
    _, step, count = span(part.origin, part.shape, len(pack.shape) - 2)
    return (
        (step == 1 or count == 1)
        and span(part.origin, part.shape, len(pack.shape) - 1) == (0, 1, width)
        and all(_aligned(pack, rows // pack.segments, *run) for run in runs_of_rows(pack, part))
    )


def _aligned(pack: Pack, height: int, first: int, count: int, segment: int) -> bool:
    begin, quantum = first - segment * height, pack.form.quantum_rows
    return begin % quantum == 0 and (count % quantum == 0 or begin + count == height)
