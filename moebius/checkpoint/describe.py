"""A plan in words: the table that `moebius plan` prints, and the same as plain data.  No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moebius.checkpoint.converter import template_of

if TYPE_CHECKING:  # planning imports this module
    from moebius.checkpoint.conversion import Conversion
    from moebius.checkpoint.planning import Plan


@dataclass(frozen=True)
class Row:
    """Stored tensors that go the same way.  casts: "bfloat16" or "bfloat16 -> float32"."""

    tensors: int
    nbytes: int
    sources: str
    targets: str
    operations: tuple[str, ...]
    casts: str


def size(nbytes: int) -> str:
    """Bytes as people read them: 57.98 GB, 12.5 MB (powers of ten, as disks and hubs count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


def table(plan: Plan) -> str:
    rows = [_row_line(row) for row in _rows(plan)]
    skips = Counter(reason for _, reason in plan.skipped)
    lines = [f"{count:>8,}  skipped: {reason}" for reason, count in skips.items()]
    doubles = [f"{1:>8,}  {info.name} = {target}, tied; compared" for info, target in plan.doubles]
    return "\n".join([*rows, *lines, *doubles, _totals(plan)])


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "folder": str(plan.files.folder),
        "shards": len(plan.files.shards),
        "rows": [asdict(row) for row in _rows(plan)],
        "skipped": [{"key": info.name, "bytes": info.nbytes, "reason": reason} for info, reason in plan.skipped],
        "tied": [{"key": info.name, "target": target} for info, target in plan.doubles],
        "tensors": len(plan.ways),
        "parameters": len(plan.targets),
        "bytes_to_read": plan.bytes_to_read,
        "target_bytes": plan.target_bytes,
        "quantized_bytes": plan.quantized_bytes,
        "peak_bytes": plan.peak_bytes,
    }


def _rows(plan: Plan) -> list[Row]:
    """Conversions by what they do; tensors that are copied under their own name share a row a cast."""
    groups: dict[tuple[str, str, tuple[str, ...], str], list[int]] = {}
    taken = Counter[str]()
    for way in plan.ways:
        taken[way.info.name] += way.nbytes
    for conversion in plan.conversions:
        tally = groups.setdefault(_way(plan, conversion), [0, 0])
        tally[0] += len(conversion.keys)
        tally[1] += sum(taken[plan.stored[key].name] for key in conversion.keys)
    return [Row(count, nbytes, *way) for way, (count, nbytes) in groups.items()]


def _way(plan: Plan, conversion: Conversion) -> tuple[str, str, tuple[str, ...], str]:
    """What the conversions of one row have in common: sources, targets, operations, casts."""
    found, target = plan.stored[conversion.keys[0]].dtype, conversion.targets[0]
    form = plan.quantized.get(target)
    wanted = form.name if form else plan.targets[target].dtype
    casts = found if found == wanted else f"{found} -> {wanted}"
    if conversion.rule is None:
        return *_copy(conversion.keys, conversion.targets), (), casts
    sources, targets = (
        braced(pattern.text for pattern in side) for side in (conversion.rule.sources, conversion.rule.targets)
    )
    return sources, targets, tuple(type(operation).__name__ for operation in conversion.rule.operations), casts


def _copy(keys: tuple[str, ...], targets: tuple[str, ...]) -> tuple[str, str]:
    if keys == targets:
        return "tensors under their own names", "copied"
    return template_of(keys[0]), template_of(targets[0])


def _row_line(row: Row) -> str:
    operations = f"  {', '.join(row.operations)}" if row.operations else ""
    return f"{row.tensors:>8,}  {size(row.nbytes):>10}  {row.casts}  {row.sources} -> {row.targets}{operations}"


def _totals(plan: Plan) -> str:
    shards = "1 file" if len(plan.files.shards) == 1 else f"{len(plan.files.shards)} files"
    counts = f"{len(plan.ways):,} tensors in {shards} -> {len(plan.targets):,} parameters"
    rest = f"skipped {len(plan.skipped)}, missing 0, unexpected 0"
    reads = f"reads {size(plan.bytes_to_read)}{_quantized(plan)}"
    return f"{counts}; {rest}\n{reads}; peak memory {size(plan.peak_bytes)}"


def _quantized(plan: Plan) -> str:
    """Of what is read, the bytes that are quantized, and to how many."""
    if not plan.packs:
        return ""
    read, packed = sum(pack.nbytes for pack in plan.packs), plan.quantized_bytes
    return f", of which {size(read)} are quantized to {size(packed)}"


def braced(names: Iterable[str]) -> str:
    """a.w1.weight, a.w3.weight -> a.{w1,w3}.weight"""
    listed = list(names)
    split = [name.split(".") for name in listed]
    differing = {at for at in range(len(split[0])) if len({tuple(parts[at : at + 1]) for parts in split}) > 1}
    if len({len(parts) for parts in split}) > 1 or len(differing) > 1:
        return ", ".join(listed)
    choices = ",".join(dict.fromkeys(".".join(parts[at] for at in sorted(differing)) for parts in split))
    return ".".join("{" + choices + "}" if at in differing else part for at, part in enumerate(split[0]))
