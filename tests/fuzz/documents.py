"""JSON and safetensors taken apart so that they can be put together wrongly: keys twice, numbers that are none.

No torch, no safetensors library, none of Moebius.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Link:
    """A symbolic link in a file's place."""

    target: str


@dataclass(frozen=True)
class Special:
    """What else may stand in a file's place.  kind: "folder" or "pipe"."""

    kind: str


Content = bytes | Link | Special
Files = dict[str, Content]


class Pairs(list):
    """A JSON object as [key, value] pairs in their order, so that a key may stand twice."""

    def get(self, key: str, default: Any = None) -> Any:
        return next((value for name, value in self if name == key), default)

    def put(self, key: str, value: Any) -> None:
        """Replaces the value of a key, or adds the key."""
        for pair in self:
            if pair[0] == key:
                pair[1] = value
                return
        self.append([key, value])

    def drop(self, key: str) -> None:
        self[:] = [pair for pair in self if pair[0] != key]

    def keys(self) -> list[str]:
        return [key for key, _ in self]


@dataclass(frozen=True)
class Literal:
    """Text that stands in a document as it is."""

    text: str


def parse(raw: Content | None) -> Any:
    """The document, objects as Pairs.  ValueError: there is none, or it cannot be read any more."""
    if not isinstance(raw, bytes):
        raise ValueError("no file")
    try:
        return json.loads(raw, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs))
    except RecursionError as error:
        raise ValueError("too deep") from error


def render(value: Any) -> str:
    match value:
        case Literal():
            return value.text
        case Pairs():
            return "{" + ",".join(f"{json.dumps(key)}:{render(item)}" for key, item in value) + "}"
        case list():
            return "[" + ",".join(map(render, value)) + "]"
        case _:
            return json.dumps(value)


def rendered(value: Any) -> bytes:
    return render(value).encode()


def nodes(value: Any) -> Iterator[tuple[Any, int, list[str]]]:
    """(container, position, keys on the way) of every value in a document: a pair of Pairs, an item of a list."""
    yield from _below(value, [])


def _below(value: Any, way: list[str]) -> Iterator[tuple[Any, int, list[str]]]:
    if isinstance(value, Pairs):
        for position, (key, item) in enumerate(value):
            yield value, position, [*way, key]
            yield from _below(item, [*way, key])
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield value, position, way
            yield from _below(item, way)


# --- shards ----------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor as a shard holds it.  dtype: the format's code."""

    dtype: str
    shape: list[int]
    data: bytes

    @property
    def fits(self) -> bool:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype] == len(self.data)


Shard = dict[str, Stored]


def split(raw: Content | None) -> tuple[Pairs, bytes]:
    """A shard's header and its data.  ValueError: it is no shard any more."""
    if not isinstance(raw, bytes) or len(raw) < 8:
        raise ValueError("no shard")
    length = int.from_bytes(raw[:8], "little")
    header = parse(raw[8 : 8 + length])
    if not isinstance(header, Pairs):
        raise ValueError("no header")
    return header, raw[8 + length :]


def join(header: Any, data: bytes, padding: int = 8) -> bytes:
    text = rendered(header)
    text += b" " * (-len(text) % padding)
    return len(text).to_bytes(8, "little") + text + data


def unpack(raw: Content | None) -> Shard:
    """A shard's tensors in the order of its header.  ValueError: it is no shard any more."""
    header, data = split(raw)
    try:
        entries = {key: (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")) for key, entry in header}
        entries.pop("__metadata__", None)
        tensors = {
            key: Stored(dtype, [*shape], data[slice(*map(int, at))]) for key, (dtype, shape, at) in entries.items()
        }
        if not all(tensor.fits for tensor in tensors.values()):
            raise ValueError("sizes do not fit")
    except (AttributeError, TypeError, KeyError, OverflowError) as error:
        raise ValueError("no entries") from error
    return tensors


def pack(tensors: Shard) -> bytes:
    header, parts, end = Pairs([["__metadata__", Pairs([["format", "pt"]])]]), [], 0
    for key, tensor in tensors.items():
        extent = [end, end + len(tensor.data)]
        header.append([key, Pairs([["dtype", tensor.dtype], ["shape", tensor.shape], ["data_offsets", extent]])])
        parts.append(tensor.data)
        end = extent[1]
    return join(header, b"".join(parts))


def shard_names(files: Files) -> list[str]:
    return sorted(name for name, content in files.items() if name.endswith(".safetensors"))


def unpack_all(files: Files) -> dict[str, Shard]:
    """ValueError: one of the shards cannot be read any more."""
    return {name: unpack(files[name]) for name in shard_names(files)}


def pack_all(files: Files, shards: dict[str, Shard]) -> None:
    """Writes shards and, where there is one, an index that agrees with them."""
    for name, tensors in shards.items():
        files[name] = pack(tensors)
    if INDEX in files:
        entries = Pairs([key, name] for name, tensors in shards.items() for key in tensors)
        files[INDEX] = rendered(Pairs([["metadata", Pairs([["total_size", 0]])], ["weight_map", entries]]))
