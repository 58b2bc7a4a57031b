"""In which form a model's weights lie on disk, and in which they are held in memory: from the plan alone. No torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moebius.checkpoint.conversion import Conversion
    from moebius.opening import OpenedCheckpoint

Part = Literal["experts", "rest"]


@dataclass(frozen=True)
class Storage:
    """Weights of one part that go from one form to one form; bytes of both, scales included."""

    part: Part
    on_disk: str
    disk_bytes: int
    in_memory: str
    memory_bytes: int


def storage(opened: "OpenedCheckpoint") -> list[Storage]:
    """Routed experts first, then by bytes."""
    disk, memory = Counter[tuple[Part, str, str]](), Counter[tuple[Part, str, str]]()
    for conversion in opened.plan.conversions:
        way = _way(opened, conversion)
        disk[way] += sum(opened.plan.stored[key].nbytes for key in conversion.keys)
        memory[way] += sum(opened.plan.targets[name].nbytes for name in conversion.targets)
    ways = sorted(disk, key=lambda way: (way[0], -disk[way]))
    return [Storage(part, on_disk, disk[way], held, memory[way]) for way in ways for part, on_disk, held in [way]]


def _way(opened: "OpenedCheckpoint", conversion: "Conversion") -> tuple[Part, str, str]:
    name = conversion.targets[0]
    part: Part = "experts" if ".mlp.experts." in name else "rest"
    form = opened.held.get(name.removesuffix("_scale"))
    if form is not None:
        return part, form.name, form.name
    return part, opened.plan.stored[conversion.keys[0]].dtype, opened.plan.targets[name].dtype


def as_rows(stored: list[Storage]) -> list[dict[str, Any]]:
    return [asdict(one) for one in stored]


def held_as(report: dict[str, Any], part: str) -> str:
    """The forms in which a part, or all ("total"), is held in memory: bfloat16, or fp8_block + bfloat16."""
    rows = [row for row in report.get("storage", []) if part in (row["part"], "total")]
    by_bytes = sorted(rows, key=lambda row: -row["memory_bytes"])
    return " + ".join(dict.fromkeys(row["in_memory"] for row in by_bytes)) or report["dtype"]


def lines(report: dict[str, Any]) -> Iterator[str]:
    """`experts  mxfp4 12.10 GB on disk, kept so in memory`, and so on; nothing where all weights are plain."""
    from moebius.checkpoint.describe import size
    from moebius.checkpoint.encodings import FORM_NAMES

    rows = report.get("storage", [])
    if not any(row["on_disk"] in FORM_NAMES for row in rows):
        return
    for row in rows:
        held = "kept so in memory"
        if row["in_memory"] != row["on_disk"]:
            held = f"{row['in_memory']} {size(row['memory_bytes'])} in memory"
        yield f"  {row['part']:<8} {row['on_disk']} {size(row['disk_bytes'])} on disk, {held}"
