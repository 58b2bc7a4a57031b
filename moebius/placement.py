"""Which device each part of a model goes to: arithmetic alone.  No torch.

A part runs in one piece: the embedding (with the head, where it is tied), a layer, the last norm, the head.  A device
is written as torch writes it: "cpu", "meta", "cuda:0".
"""

import difflib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from moebius.checkpoint.owning import owned
from moebius.checkpoint.planning import Plan
from moebius.distributed.layout import ExpertLayout
from moebius.errors import ArgumentError, CapacityError, Fault

CPU, CUDA = "cpu", "cuda:"
STRATEGIES = ("auto", "balanced", "sequential")
KEPT_FREE, LEAST_KEPT_FREE = 0.1, 1 << 30  # of a GPU, for the cache and activations
ORDER = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")  # in which parts run
NAMES = 'name each part once: "model.embed_tokens", "model.layers.0", ..., "model.norm", "lm_head"; or say "auto"'
WEIGHTLESS = ("model.rotary_emb",)  # transformers' maps name it; it holds no weight

FreeBytes = Callable[[str], int | None]
"""Of a device; None where it is not known."""


@dataclass(frozen=True)
class Modules:
    """A device for each module that is named; "" is the whole model, "model.layers" all layers."""

    modules: Mapping[str, str]

    @property
    def devices(self) -> Sequence[str]:
        return list(dict.fromkeys(self.modules.values()))


@dataclass(frozen=True)
class Strategy:
    """How parts are spread over `devices`, in their order, the host last.

    name: "auto": one GPU if one can take all, else "balanced".  "balanced": as evenly as whole parts allow over all
    GPUs; where these cannot take all, each is filled.  "sequential": each GPU is filled before the next one.
    limits: bytes that weights may take of a device.  Without one a GPU keeps a tenth of what it has free, at least
    1 GiB, for the cache and activations, and the host takes whatever is left over.
    """

    name: str
    devices: Sequence[str]
    limits: Mapping[str, int]


DeviceMap = Modules | Strategy


def place(wanted: DeviceMap, plan: Plan, free: FreeBytes) -> dict[str, str]:
    """{target: device} for all targets of the plan.

    free: asked only about GPUs that may be used and have no limit.  ArgumentError: modules that are unknown, named
    twice, on no device, or within a layer.  CapacityError: the limits are too small for the model.
    """
    parts = parts_of(plan)
    match wanted:
        case Modules(modules):
            found = by_modules(list(parts), modules, _ties(plan))
        case Strategy():
            found = split(parts, wanted, free)
    return {name: found[part_of(name)] for name in plan.targets}


def part_of(name: str) -> str:
    """The part that a tensor belongs to: model.layers.3 of model.layers.3.self_attn.q_proj.weight."""
    fields = name.split(".")
    return ".".join(fields[:3] if fields[:2] == ["model", "layers"] else fields[:-1])


def parts_of(plan: Plan) -> dict[str, int]:
    """The bytes of each part, in the order in which they run."""
    nbytes = Counter[str]()
    for target in plan.targets.values():
        nbytes[part_of(target.name)] += target.nbytes
    return {part: nbytes[part] for part in sorted(nbytes, key=_place_in_order)}


def _place_in_order(part: str) -> tuple[int, int]:
    stem, _, number = part.rpartition(".")
    return (ORDER.index(stem), int(number)) if number.isdecimal() else (ORDER.index(part), 0)


def _ties(plan: Plan) -> dict[str, str]:
    """Parts without a tensor of their own, and the parts whose tensor they use."""
    return {part_of(alias): part_of(target.name) for target in plan.targets.values() for alias in target.aliases}


def is_gpu(device: str) -> bool:
    return device.startswith(CUDA)


def hf_device_map(devices: Mapping[str, str]) -> dict[str, int | str]:
    """{part: device} from {tensor: device}; {"": device} where all are on one.  GPUs are numbers, as in transformers.

    A part whose tensors are on several devices is named by its first tensor's.
    """
    parts: dict[str, str] = {}
    for name, device in devices.items():
        parts.setdefault(part_of(name), device)
    if len(set(devices.values())) == 1:
        parts = {"": next(iter(parts.values()))}
    return {part: int(device.removeprefix(CUDA)) if is_gpu(device) else device for part, device in parts.items()}


# --- a device a module ---------------------------------------------------------------------------------------------


def by_modules(parts: Sequence[str], modules: Mapping[str, str], ties: Mapping[str, str]) -> dict[str, str]:
    """{part: device}.  ties: parts that are to go where another one goes."""
    namers = {part: [name for name in modules if _covers(name, part)] for part in parts}
    faults = [
        *_unknown(parts, modules, ties),
        *_not_once(namers, modules),
        *_untied(namers, modules, ties),
        *_partly_meta(modules),
    ]
    if faults:
        raise ArgumentError("device_map does not fit the model", faults=faults, advice=NAMES)
    return {part: modules[name] for part, (name,) in namers.items()}


def _covers(name: str, part: str) -> bool:
    return name in ("", part) or part.startswith(f"{name}.")


def _partly_meta(modules: Mapping[str, str]) -> Iterator[Fault]:
    if len(set(modules.values())) > 1:
        yield from (Fault(name, "meta", "all of a model is, or none") for name in modules if modules[name] == "meta")


def _unknown(parts: Sequence[str], modules: Mapping[str, str], ties: Mapping[str, str]) -> Iterator[Fault]:
    for name in modules:
        within = next((part for part in parts if name.startswith(f"{part}.")), None)
        if within:
            yield Fault(name, "within a part", f"{within} goes to one device as a whole")
        elif name not in (*ties, *WEIGHTLESS) and not any(_covers(name, part) for part in parts):
            near = difflib.get_close_matches(name, parts, n=1)
            detail = f"did you mean {near[0]}?" if near else "the model has none of this name"
            yield Fault(name, "unknown module", detail)


def _not_once(namers: Mapping[str, Sequence[str]], modules: Mapping[str, str]) -> Iterator[Fault]:
    for part, names in namers.items():
        if len(names) > 1:
            yield Fault(part, "named twice", " and ".join(f"by {name!r}: {modules[name]}" for name in names))
        elif not names:
            yield Fault(part, "on no device", "no name in device_map covers it")


def _untied(
    namers: Mapping[str, Sequence[str]], modules: Mapping[str, str], ties: Mapping[str, str]
) -> Iterator[Fault]:
    for part, owner in ties.items():
        theirs = {modules[name] for name in namers[owner]}
        if part in modules and theirs and modules[part] not in theirs:
            detail = f"{modules[part]}; its weight is that of {owner}, on {', '.join(theirs)}"
            yield Fault(part, "tied weight on two devices", detail)


# --- spread over devices ---------------------------------------------------------------------------------------------


def split(parts: Mapping[str, int], strategy: Strategy, free: FreeBytes) -> dict[str, str]:
    """{part: device}.  parts: bytes of each, in the order in which they run, which is the order of the devices."""
    room, total = cache(lambda device: _room(device, strategy.limits, free)), sum(parts.values())
    gpus = [device for device in strategy.devices if device != CPU]
    one = next((gpu for gpu in gpus if total <= room(gpu)), None) if strategy.name == "auto" else None
    if one:
        return dict.fromkeys(parts, one)
    rooms = {device: room(device) for device in strategy.devices}
    found = (strategy.name != "sequential" and _evenly(parts, {gpu: rooms[gpu] for gpu in gpus})) or _filled(
        parts, rooms
    )
    if len(found) < len(parts):
        raise CapacityError(
            f"the model's {total:,} bytes do not fit within the limits; no weight was read",
            faults=[Fault(device, "limit", f"{math.floor(nbytes):,} bytes") for device, nbytes in rooms.items()],
            advice='give max_memory more room, a "cpu" in it takes what the GPUs cannot',
        )
    return found


def _room(device: str, limits: Mapping[str, int], free: FreeBytes) -> float:
    """The bytes that weights may take of a device."""
    if device in limits:
        return limits[device]
    nbytes = None if device == CPU else free(device)
    return math.inf if nbytes is None else nbytes - max(KEPT_FREE * nbytes, LEAST_KEPT_FREE)


def _filled(parts: Mapping[str, int], rooms: Mapping[str, float]) -> dict[str, str]:
    """Each device takes as many of the parts that follow as it has room for; what no device takes is left out."""
    found, rest = dict[str, str](), list(parts)
    for device, room in rooms.items():
        sizes = list(accumulate(parts[part] for part in rest))
        taken = sum(size <= room for size in sizes)
        found |= dict.fromkeys(rest[:taken], device)
        rest = rest[taken:]
    return found


def _evenly(parts: Mapping[str, int], rooms: Mapping[str, float]) -> dict[str, str]:
    """All parts, so that the fullest device takes as little as possible; nothing, if they do not fit."""

    def within(most: int) -> dict[str, str]:
        return _filled(parts, {device: min(room, most) for device, room in rooms.items()})

    total = sum(parts.values())
    least = bisect_left(range(total), True, key=lambda most: len(within(most)) == len(parts))
    found = within(least)
    return found if len(found) == len(parts) else {}


# --- ranks of expert parallelism -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankShare:
    """Bytes of one rank that holds its share of every layer's experts, and everything else."""

    reads: int
    holds: int


def rank_shares(plan: Plan, ranks: int) -> list[RankShare]:
    """Of `ranks` ranks that share the experts of every layer.  ArgumentError: less than one rank."""
    if ranks < 1:
        raise ArgumentError(f"ranks: expected 1 or more, found {ranks}")
    boxes = [_boxes(plan, rank, ranks) for rank in range(ranks)]
    counts = [tuple(map(len, mine.values())) for mine in boxes]
    shares = {count: _share(plan, mine) for count, mine in dict(zip(counts, boxes, strict=True)).items()}
    return [shares[count] for count in counts]  # ranks with as many experts have as many bytes: a layer's are alike


def _share(plan: Plan, boxes: Mapping[str, range]) -> RankShare:
    mine = owned(plan, boxes)
    return RankShare(mine.bytes_to_read, mine.target_bytes)


def _boxes(plan: Plan, rank: int, ranks: int) -> dict[str, range]:
    """Which experts a rank holds, of each tensor that has any."""
    names = (name for name in plan.targets if _holds_experts(name))
    return {name: ExpertLayout(plan.targets[name].shape[0], ranks).experts_of(rank) for name in names}


def _holds_experts(name: str) -> bool:
    return name.rpartition(".")[0].endswith(".experts")
