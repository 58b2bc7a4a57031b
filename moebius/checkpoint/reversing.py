"""The plan of a save: which tensors to write, into which files, from which parts of the model.  No torch.

A loaded model is written the way it was read: the same files, keys and order.  A model made from nothing is written as
if a source in the family's published layout had been there: its first rule for each parameter, run backwards.

New files are laid out for being mapped: their data begin on a page, tensors that fill whole pages come first and stay
in the order in which they lie in the model's parameters, the rest follows.  A packed parameter then is one run of
the file, page for page (see mapping.py); to every other reader it is a safetensors file like any other.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moebius.checkpoint.conversion import Conversion, copied, expand
from moebius.checkpoint.converter import PrefixRenaming, Rule, WeightConverter, stored_key
from moebius.checkpoint.files import CODES, ITEM_BYTES, SINGLE_FILE, ShardFile, TensorInfo
from moebius.checkpoint.planning import Plan, Read, Target

MAX_SHARD_BYTES = 5_000_000_000  # the hub's habit
PAGE_BYTES = 4096  # where pages are larger, mapping.py finds the tensors' place within them


@dataclass(frozen=True)
class Shard:
    """A file to be written: its header, then each tensor at its offset.  carried: copied from the source's files."""

    name: str
    header: bytes
    reads: tuple[Read, ...]
    carried: tuple[tuple[TensorInfo, TensorInfo], ...] = ()  # (as it will lie, as it lies in the source)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self.header) + sum(info.nbytes for info in infos(self))


@dataclass(frozen=True)
class SavePlan:
    """shapes: of the model's tensors, whole."""

    shards: tuple[Shard, ...]
    index: bytes | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for shard in self.shards for info in infos(shard))


def infos(shard: Shard) -> Iterator[TensorInfo]:
    yield from (read.info for read in shard.reads)
    yield from (info for info, _ in shard.carried)


def as_loaded(plan: Plan, dtypes: Mapping[str, str]) -> SavePlan:
    """The source's files again, with tensors of the dtypes that the model holds now ({target name: dtype}).

    Where no dtype changed, headers and index are the source's bytes.
    """
    reads = {read.info.name: read for read in plan.reads}
    reads |= {info.name: _double(info, plan.targets[name]) for info, name in plan.doubles}
    now = {key: dtypes[read.parts[0].name] if read.parts else read.info.dtype for key, read in reads.items()}
    shapes = _shapes(plan.targets.values())
    if all(now[key] == read.info.dtype for key, read in reads.items()):
        return SavePlan(tuple(_same_shard(shard, reads) for shard in plan.files.shards), plan.files.index, shapes)
    shards = tuple(_retyped_shard(shard, reads, now) for shard in plan.files.shards)
    return SavePlan(shards, index_of(shards) if plan.files.index else None, shapes)


def from_nothing(rules: Iterable[Rule], targets: Iterable[Target], max_shard_bytes: int = MAX_SHARD_BYTES) -> SavePlan:
    """The published layout of a model that no file stands behind: tied weights once, shards up to the given size."""
    wanted, given = {target.name: target for target in targets}, list(rules)
    converters = [rule for rule in given if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in given if isinstance(rule, PrefixRenaming)]
    reads = [read for form in _published(converters, wanted) for read in _pieces(form, wanted, renamings)]
    groups = list(_grouped(reads, max_shard_bytes))
    names = [SINGLE_FILE] if len(groups) == 1 else [_shard_name(at, len(groups)) for at in range(len(groups))]
    shards = tuple(_new_shard(name, group) for name, group in zip(names, groups, strict=True))
    return SavePlan(shards, index_of(shards) if len(shards) > 1 else None, _shapes(wanted.values()))


def renamed(plan: SavePlan, names: Mapping[str, str]) -> SavePlan:
    """The same tensors in files of other names ({old: new}); they get an index."""
    shards = tuple(replace(shard, name=names[shard.name]) for shard in plan.shards)
    return replace(plan, shards=shards, index=index_of(shards))


def _shapes(targets: Iterable[Target]) -> dict[str, tuple[int, ...]]:
    return {target.name: target.shape for target in targets}


# --- as it was loaded --------------------------------------------------------------------------------------------


def _double(info: TensorInfo, target: Target) -> Read:
    return Read(info, copied(target.name, target.shape, info.name).sources[0][0].layout.parts)


def _same_shard(shard: ShardFile, reads: Mapping[str, Read]) -> Shard:
    mine = tuple(reads[info.name] for info in shard.tensors if info.name in reads)
    carried = tuple((info, info) for info in shard.tensors if info.name not in reads)
    return Shard(shard.path.name, shard.header, mine, carried)


def _retyped_shard(shard: ShardFile, reads: Mapping[str, Read], now: Mapping[str, str]) -> Shard:
    entries = [(info.name, now.get(info.name, info.dtype), info.shape) for info in shard.tensors]
    metadata = json.loads(shard.header[8:]).get("__metadata__")
    header, placed = lay_out(shard.path.name, entries, metadata)
    mine = tuple(Read(placed[info.name], reads[info.name].parts) for info in shard.tensors if info.name in reads)
    carried = tuple((placed[info.name], info) for info in shard.tensors if info.name not in reads)
    return Shard(shard.path.name, header, mine, carried)


# --- from nothing --------------------------------------------------------------------------------------------------


def _published(rules: Sequence[WeightConverter], targets: Mapping[str, Target]) -> Iterator[Conversion]:
    shapes = _shapes(targets.values())
    done: set[str] = set()
    for name, target in targets.items():
        if name in done:
            continue
        fits = ((rule, match) for rule in rules if (match := rule.match_target(name)))
        rule, match = next(fits, (None, None))
        form = expand(rule, match, shapes, {}) if rule and match else copied(name, target.shape, name)
        done.update(form.targets)
        yield form


def _pieces(form: Conversion, targets: Mapping[str, Target], renamings: Sequence[PrefixRenaming]) -> Iterator[Read]:
    """The tensors of one conversion; those of one list index stand together, as the hub writes them."""
    dtype = targets[form.targets[0]].dtype
    for sources in zip(*form.sources, strict=True):
        for source in sources:
            nbytes = math.prod(source.layout.shape) * ITEM_BYTES[dtype]
            key = stored_key(source.key, renamings)
            yield Read(TensorInfo(key, dtype, source.layout.shape, nbytes, "", 0), source.layout.parts)


def _grouped(reads: Sequence[Read], limit: int) -> Iterator[list[Read]]:
    group, nbytes = list[Read](), 0
    for read in reads:
        if group and nbytes + read.info.nbytes > limit:
            yield group
            group, nbytes = [], 0
        group.append(read)
        nbytes += read.info.nbytes
    yield group


def _shard_name(at: int, count: int) -> str:
    return f"model-{at + 1:05d}-of-{count:05d}.safetensors"


def _new_shard(name: str, reads: Sequence[Read]) -> Shard:
    entries = [(read.info.name, read.info.dtype, read.info.shape) for read in reads]
    header, placed = lay_out(name, entries, {"format": "pt"})
    return Shard(name, header, tuple(Read(placed[read.info.name], read.parts) for read in reads))


# --- the format ------------------------------------------------------------------------------------------------------


def lay_out(
    file: str, entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """A safetensors header for (name, dtype, shape) entries, and where each tensor will lie in the file.

    The header is padded to whole pages.  What fills whole pages comes first, in the given order; of the rest, wide
    dtypes come first.  So every tensor is aligned to its elements, and most to pages.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape in sorted(entries, key=_rank):
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        ends[name] = (begin, end)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    raw = len(text).to_bytes(8, "little") + text
    placed = {
        name: TensorInfo(name, dtype, shape, ends[name][1] - ends[name][0], file, len(raw) + ends[name][0])
        for name, dtype, shape in entries
    }
    return raw, placed


def _rank(entry: tuple[str, str, tuple[int, ...]]) -> int:
    _, dtype, shape = entry
    fills_pages = math.prod(shape) * ITEM_BYTES[dtype] % PAGE_BYTES == 0
    return -PAGE_BYTES if fills_pages else -ITEM_BYTES[dtype]


def index_of(shards: Sequence[Shard]) -> bytes:
    weight_map = {info.name: shard.name for shard in shards for info in infos(shard)}
    total = sum(info.nbytes for shard in shards for info in infos(shard))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
