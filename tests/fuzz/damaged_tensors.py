"""Damages of tensors, with headers and an index that agree.

Each changes the files in place and gives the names of which an error has to say at least one; none: any will do.  A
damage that does not apply (what it wants to change is not there, or can no longer be read) raises ValueError.
"""

import math
import random

from tests.fuzz.documents import ITEM_BYTES, Files, Pairs, Shard, Stored, join, pack, pack_all, split, unpack_all
from tests.fuzz.oddities import Names

FOREIGN_KEYS = ("mtp.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.7.x.weight", "x", "a b")
FOREIGN_KEYS += ("vision_tower.x.weight", "model.layers.0.mlp.experts.weight", "model..weight", ".", "a" * 5000)


def tensor_removed(rng: random.Random, files: Files) -> Names:
    shards, name, key = _some_tensor(rng, files)
    del shards[name][key]
    pack_all(files, shards)
    return {key, name}


def tensor_renamed(rng: random.Random, files: Files) -> Names:
    shards, name, key = _some_tensor(rng, files)
    numbers = ("0", "1", "2", "3", "9", "03", "-1", "٣", "1.0", str(2**63), "")
    segments = [rng.choice(numbers) if part.isdecimal() and rng.random() < 0.7 else part for part in key.split(".")]
    cut = (
        key.replace("proj", "project"),
        key.removesuffix(".weight"),
        f"model.{key}",
        key.replace("gate", "up"),
        key.upper(),
    )
    new = rng.choice((".".join(segments), ".".join(segments), *cut, rng.choice(FOREIGN_KEYS), f"{key}_scale_inv"))
    shards[name][new] = shards[name].pop(key)
    pack_all(files, shards)
    return {key, new, name}


def tensor_added(rng: random.Random, files: Files) -> Names:
    shards, name, key = _some_tensor(rng, files)
    beside = (f"{key}_scale_inv", f"{key}_scale", f"{key}_packed", f"{key}_shape", f"{key}_blocks", f"{key}_scales")
    experts = [key.replace(f"experts.{index}.", f"experts.{index + rng.randint(1, 9)}.") for index in range(3)]
    new = rng.choice((*beside, *experts, *FOREIGN_KEYS, f"{key}.bias", key.replace(".weight", ".bias")))
    home = rng.choice([*shards])
    shards[home].setdefault(new, rng.choice((shards[name][key], _small(rng))))
    pack_all(files, shards)
    return {new, key, home}


def tensor_in_two_shards(rng: random.Random, files: Files) -> Names:
    shards, name, key = _some_tensor(rng, files)
    others = [other for other in shards if other != name]
    if not others:
        raise ValueError("one shard")
    home = rng.choice(others)
    shards[home][key] = shards[name][key]
    pack_all(files, shards)
    return {key}


def tensors_swapped(rng: random.Random, files: Files) -> Names:
    """Two tensors exchange their names: a checkpoint of other weights, if the shapes fit."""
    shards, name, key = _some_tensor(rng, files)
    other_name, other = _another(rng, shards, key)
    shards[name][key], shards[other_name][other] = shards[other_name][other], shards[name][key]
    pack_all(files, shards)
    return {key, other}


def tensor_cast(rng: random.Random, files: Files) -> Names:
    """One tensor in another dtype, with as many bytes as that needs."""
    shards, name, key = _some_tensor(rng, files)
    found, dtype = shards[name][key], rng.choice([*ITEM_BYTES])
    shards[name][key] = Stored(dtype, found.shape, rng.randbytes(math.prod(found.shape) * ITEM_BYTES[dtype]))
    pack_all(files, shards)
    return {key}


def tensor_reshaped(rng: random.Random, files: Files) -> Names:
    """Turned around or cut, with data of the right length."""
    shards, name, key = _some_tensor(rng, files)
    found = shards[name][key]
    shape = rng.choice((found.shape[::-1], [*found.shape, 1], [1, *found.shape], found.shape[1:], [*found.shape, 0]))
    shape = rng.choice((shape, [max(0, size + rng.choice((-1, 0, 1))) for size in found.shape]))
    size = math.prod(shape) * ITEM_BYTES[found.dtype]
    shards[name][key] = Stored(found.dtype, shape, (found.data * 2 + bytes(size))[:size])
    pack_all(files, shards)
    return {key}


def all_cast(rng: random.Random, files: Files) -> Names:
    """Every tensor of one dtype said to be of another of the same width."""
    shards, name, key = _some_tensor(rng, files)
    old = shards[name][key].dtype
    new = rng.choice([code for code, size in ITEM_BYTES.items() if size == ITEM_BYTES[old]])
    tensors = [tensor for shard in shards.values() for tensor in shard.values() if tensor.dtype == old]
    for tensor in tensors:
        tensor.dtype = new
    pack_all(files, shards)
    return {found for shard in shards.values() for found, tensor in shard.items() if tensor in tensors}


def data_bits(rng: random.Random, files: Files) -> Names:
    """Other numbers, infinities and NaN among them: nothing that a header could show."""
    shards, name, key = _some_tensor(rng, files)
    tensor = shards[name][key]
    tensor.data = rng.choice((rng.randbytes(len(tensor.data)), bytes(len(tensor.data)), b"\xff" * len(tensor.data)))
    pack_all(files, shards)
    return {key}


def bytes_shared(rng: random.Random, files: Files) -> Names:
    """A tensor's bytes gone, and its entry pointing into those of another; nothing else overlaps or is left over."""
    shards, name, key = _some_tensor(rng, files)
    found = shards[name].pop(key)
    header, data = split(pack(shards[name]))
    room = len(data) - len(found.data)
    if room < 0:
        raise ValueError("nowhere to point")
    begin = rng.choice((0, room, rng.randint(0, room), 64 * rng.randint(0, room // 64)))
    extent = [begin, begin + len(found.data)]
    header.append([key, Pairs([["dtype", found.dtype], ["shape", found.shape], ["data_offsets", extent]])])
    files[name] = join(header, data)
    return {key, name, *header.keys()}


def bytes_between(rng: random.Random, files: Files) -> Names:
    """Bytes in front of a tensor, or at the end, that belong to none."""
    shards, name, key = _some_tensor(rng, files)
    header, data = split(pack(shards[name]))
    at, more = rng.choice((header.get(key).get("data_offsets")[0], len(data))), rng.choice((1, 8, 64, 4096))
    for other in shards[name]:
        begin, end = header.get(other).get("data_offsets")
        header.get(other).put("data_offsets", [begin + more, end + more] if begin >= at else [begin, end])
    files[name] = join(header, data[:at] + rng.randbytes(more) + data[at:])
    return {key, name, *header.keys()}


def _small(rng: random.Random) -> Stored:
    shape = rng.choice(([], [1], [0], [0, 5], [2, 2], [1] * 40))
    return Stored("F32", shape, bytes(4 * math.prod(shape)))


def _some_tensor(rng: random.Random, files: Files) -> tuple[dict[str, Shard], str, str]:
    shards = unpack_all(files)
    places = [(name, key) for name, tensors in shards.items() for key in tensors]
    if not places:
        raise ValueError("no tensor")
    return shards, *rng.choice(places)


def _another(rng: random.Random, shards: dict[str, Shard], key: str) -> tuple[str, str]:
    """Mostly a sibling of the same name but for an index."""
    places = [(name, other) for name, tensors in shards.items() for other in tensors if other != key]
    siblings = [place for place in places if place[1].rsplit(".", 2)[-2:] == key.rsplit(".", 2)[-2:]]
    if not places:
        raise ValueError("one tensor")
    return rng.choice(siblings if siblings and rng.random() < 0.8 else places)
