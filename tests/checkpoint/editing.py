"""Takes a checkpoint's files apart and puts them together again, byte by byte.  No torch, no safetensors library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor as a shard holds it.  dtype: the format's code."""

    dtype: str
    shape: list[int]
    data: bytes


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_weight_map(folder: Path, entries: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))


def shard_of(folder: Path, key: str) -> Path:
    return folder / weight_map(folder)[key]


def first_shard(folder: Path) -> Path:
    return folder / min(weight_map(folder).values())


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A shard's header and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: str, data: bytes) -> None:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def unpack(path: Path) -> dict[str, Stored]:
    header, data = split(path)
    header.pop("__metadata__")
    spans = {name: slice(*entry["data_offsets"]) for name, entry in header.items()}
    return {name: Stored(entry["dtype"], entry["shape"], data[spans[name]]) for name, entry in header.items()}


def pack(path: Path, tensors: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        extent = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": extent}
        data += tensor.data
    join(path, json.dumps(header), data)


def store(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Adds or replaces tensors in a shard, and in the index beside it."""
    pack(path, unpack(path) | tensors)
    write_weight_map(path.parent, weight_map(path.parent) | dict.fromkeys(tensors, path.name))


def remove(folder: Path, *keys: str) -> None:
    """Takes tensors out of shards and index."""
    for name in {weight_map(folder)[key] for key in keys}:
        pack(folder / name, {key: kept for key, kept in unpack(folder / name).items() if key not in keys})
    write_weight_map(folder, {key: name for key, name in weight_map(folder).items() if key not in keys})


def rename(folder: Path, old: str, new: str) -> None:
    """Gives a tensor another key, in its shard and in the index."""
    path = shard_of(folder, old)
    tensor = unpack(path)[old]
    remove(folder, old)
    store(path, {new: tensor})


def set_num_experts(folder: Path, number: int) -> None:
    """In both spellings, since transformers writes both."""
    edit_config(folder, num_experts=number, num_local_experts=number)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip_bit(path: Path, offset: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def values_of(tensor: Stored) -> np.ndarray:
    return np.frombuffer(tensor.data, np.float32)
