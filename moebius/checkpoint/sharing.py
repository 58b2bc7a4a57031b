"""Who writes what, where several processes write one set of files.  No torch.

Each of N ranks holds, of some tensors, a box: a run of rows of axis 0.  Several may hold the same one; all ranks hold
the tensors without boxes.  Every box is written by one of its holders, so that bytes are spread evenly; since all
ranks know all boxes, all come to the same result.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moebius.checkpoint.files import ITEM_BYTES
from moebius.checkpoint.owning import within
from moebius.checkpoint.planning import Read
from moebius.checkpoint.reversing import SavePlan, Shard
from moebius.checkpoint.team import Team
from moebius.errors import Fault, SaveError

Boxes = Mapping[str, range]


@dataclass(frozen=True)
class Offer:
    """What a rank says before a save: where to, which files (a digest of headers and names), and what it holds.

    checksums: whether it is asked to write them too.
    """

    folder: str
    files: str
    boxes: Boxes
    checksums: bool


def agreed(plan: SavePlan, boxes: Boxes, folder: Path, team: Team, *, checksums: bool = False) -> Sequence[Offer]:
    """Every rank's offer.  SaveError, on all ranks: they save to different folders, different models or in different
    ways, or do not together hold each row of each tensor.
    """
    offers = team.gathered(Offer(str(folder), _digest(plan), boxes, checksums), f"saving {folder}")
    if faults := list(_disagreements(offers)):
        raise SaveError(
            f"{folder} was not written: the ranks do not save the same model in the same way to the same place",
            faults=faults,
            advice="give the same model, folder and options on every rank",
        )
    held = [offer.boxes for offer in offers]
    if faults := [fault for name, shape in plan.shapes.items() for fault in _gaps(name, shape, held)]:
        raise SaveError(
            f"{folder} was not written: the ranks together do not hold each row once",
            faults=faults,
            advice="save a model with all the ranks that it was spread over",
        )
    return offers


def written_by(plan: SavePlan, offers: Sequence[Offer], rank: int) -> SavePlan:
    """What a rank writes of the plan, beginning with another file than the next rank does.

    Its origins count from the starts of the rank's boxes.
    """
    writers, carriers = _writers(plan, [offer.boxes for offer in offers])
    mine = {name for name, writer in writers if writer == rank}
    shards = (_written(shard, mine, offers[rank].boxes, carriers, rank) for shard in plan.shards)
    found = tuple(shard for shard in shards if shard.reads or shard.carried)
    first = rank * len(found) // len(offers)  # a file system lets one writer at a time into a file
    return replace(plan, shards=(*found[first:], *found[:first]))


def payload(share: SavePlan) -> int:
    """Bytes that a share writes."""
    ways = (read.nbytes for shard in share.shards for read in shard.reads)
    return sum(ways) + sum(info.nbytes for shard in share.shards for info, _ in shard.carried)


def _written(shard: Shard, names: set[str], boxes: Boxes, carriers: Mapping[str, int], rank: int) -> Shard:
    reads = (Read(read.info, within((p for p in read.parts if p.name in names), boxes)) for read in shard.reads)
    carried = (pair for pair in shard.carried if carriers[pair[0].name] == rank)
    return replace(shard, reads=tuple(read for read in reads if read.parts), carried=tuple(carried))


# --- do all mean the same? ------------------------------------------------------------------------------------------


def _digest(plan: SavePlan) -> str:
    digest = hashlib.sha256(repr(sorted(plan.shapes.items())).encode())
    for shard in plan.shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()


def _disagreements(offers: Sequence[Offer]) -> Iterator[Fault]:
    first = offers[0]
    for rank, offer in enumerate(offers):
        if offer.folder != first.folder:
            yield Fault(f"rank {rank}", "another folder", f"{offer.folder}, on rank 0 {first.folder}")
        elif offer.files != first.files:
            what = "its files would not have the names, or the tensors' names, shapes and dtypes, of rank 0's"
            yield Fault(f"rank {rank}", "another model or layout", what)
        if offer.checksums != first.checksums:
            found = f"checksums={offer.checksums}, on rank 0 {first.checksums}"
            yield Fault(f"rank {rank}", "another option", found)


def _gaps(name: str, shape: tuple[int, ...], held: Sequence[Boxes]) -> Iterator[Fault]:
    """Boxes that, in order, do not each begin where the one before ends."""
    rows, end = _rows(shape), 0
    for box in sorted(_holders(name, shape, held), key=lambda box: box.start):
        if box.start != end:
            what = "held by no rank" if box.start > end else "held in boxes that overlap"
            yield Fault(name, what, f"rows {min(end, box.start)} to {max(end, box.start) - 1} of {rows}")
        end = max(end, box.stop)
    if end != rows:
        yield Fault(name, "held by no rank", f"rows {end} to {rows - 1} of {rows}")


def _holders(name: str, shape: tuple[int, ...], held: Sequence[Boxes]) -> Mapping[range, list[int]]:
    """The ranks of each box that is not empty."""
    whole, found = range(_rows(shape)), defaultdict[range, list[int]](list)
    for rank, boxes in enumerate(held):
        if box := boxes.get(name, whole):
            found[box].append(rank)
    return found


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


# --- one writer a box -------------------------------------------------------------------------------------------------


def _writers(plan: SavePlan, held: Sequence[Boxes]) -> tuple[set[tuple[str, int]], dict[str, int]]:
    """({(tensor, rank that writes its box of it)}, {carried tensor: rank})."""
    loads, sizes, writers = [0] * len(held), _stored_bytes(plan), set[tuple[str, int]]()
    for name, shape in plan.shapes.items():
        for box, ranks in _holders(name, shape, held).items():
            writers.add((name, _least(loads, ranks, sizes[name] * len(box) // _rows(shape))))
    carried = [info for shard in plan.shards for info, _ in shard.carried]
    return writers, {info.name: _least(loads, range(len(held)), info.nbytes) for info in carried}


def _stored_bytes(plan: SavePlan) -> Counter[str]:
    """Of each tensor of the model, in all of the files."""
    sizes = Counter[str]()
    for read in (read for shard in plan.shards for read in shard.reads):
        for part in read.parts:
            sizes[part.name] += math.prod(part.shape) * ITEM_BYTES[read.info.dtype]
    return sizes


def _least(loads: list[int], ranks: Sequence[int], nbytes: int) -> int:
    """Of these ranks, that with the least to do, the first if there are several; it has so much more now."""
    rank = min(ranks, key=loads.__getitem__)
    loads[rank] += nbytes
    return rank
