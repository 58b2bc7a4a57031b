"""Damages of files, of headers and of the index.

Each changes the files in place and gives the names of which an error has to say at least one; none: any will do.  A
damage that does not apply (what it wants to change is not there, or can no longer be read) raises ValueError.
"""

import math
import random
from collections.abc import Callable

from tests.fuzz.documents import (
    CONFIG,
    INDEX,
    ITEM_BYTES,
    SINGLE,
    Files,
    Link,
    Pairs,
    Special,
    join,
    parse,
    rendered,
    shard_names,
    split,
)
from tests.fuzz.oddities import ANY_NAME, NUMBERS, TEXTS, Names, damage_bytes, damage_document, odd_value

IMPOSTORS = (
    b"",
    b"{}",
    b"null",
    b"<html></html>",
    b"version https://git-lfs.github.com/spec/v1\noid x\n",
    b"PK\x03\x04",
)
IMPOSTORS += (b"\x80\x02}q\x00.", b"GGUF\x03", b"\xff" * 64, bytes(64), b"\x02" + bytes(7) + b"{}", b"\x00" * 7)


# --- any file --------------------------------------------------------------------------------------------------------


def any_bytes(rng: random.Random, files: Files) -> Names:
    """Near the beginning, where headers lie, or anywhere."""
    name, raw = _some_file(rng, files)
    files[name] = damage_bytes(rng, raw, rng.choice((8, 64, 4096, len(raw) or 1)))
    return ANY_NAME if name == CONFIG else _data_of(name, raw)


def _data_of(name: str, raw: bytes) -> Names:
    """A shard, and its tensors: a flipped letter in a name is a tensor missing."""
    try:
        return {name, *(split(raw)[0].keys() if name.endswith(".safetensors") else parse(raw).get("weight_map").keys())}
    except (ValueError, AttributeError):
        return {name}


def impostor(rng: random.Random, files: Files) -> Names:
    name, raw = _some_file(rng, files)
    files[name] = rng.choice((*IMPOSTORS, rng.randbytes(64), raw[: rng.randint(0, 16)]))
    return {name}


def not_a_file(rng: random.Random, files: Files) -> Names:
    name, _ = _some_file(rng, files)
    targets = (
        "/dev/zero",
        "/dev/null",
        "/etc/hostname",
        "../outside",
        name,
        "missing",
        "/proc/self/mem",
        rng.choice([*files]),
    )
    files[name] = rng.choice((Special("folder"), Special("pipe"), *map(Link, targets)))
    return {name}


def file_missing(rng: random.Random, files: Files) -> Names:
    name, _ = _some_file(rng, files)
    del files[name]
    return {name, INDEX, SINGLE, "pytorch_model.bin", "model.gguf"}  # where these are there instead, they are named


def second_set(rng: random.Random, files: Files) -> Names:
    name = rng.choice((SINGLE, INDEX, "adapter_config.json"))
    if name in files:
        raise ValueError("it is there")
    other = rng.choice(shard_names(files))
    files[name] = rng.choice((files[other], b"{}", Special("folder"), Link(other)))
    return {name, SINGLE}


def _some_file(rng: random.Random, files: Files) -> tuple[str, bytes]:
    plain = [(name, content) for name, content in files.items() if isinstance(content, bytes)]
    if not plain:
        raise ValueError("no file")
    return rng.choice(plain)


# --- headers ---------------------------------------------------------------------------------------------------------


def header_length(rng: random.Random, files: Files) -> Names:
    name, _, raw = _some_shard(rng, files)
    length = int.from_bytes(raw[:8], "little")
    wrong = (length + rng.randint(-9, 9), 1 << rng.randrange(64), 0, 1, 2, 7, len(raw), len(raw) - 8, 2**64 - 1, 10**8)
    files[name] = (rng.choice(wrong) % 2**64).to_bytes(8, "little") + raw[8:]
    return {name}


def header_document(rng: random.Random, files: Files) -> Names:
    """Any place of the header."""
    name, header, raw = _some_shard(rng, files)
    way = damage_document(rng, header)
    files[name] = join(header, split(raw)[1], rng.choice((1, 8)))
    return {name, *way[:1], *header.keys()} if way else {name}


def header_dtype(rng: random.Random, files: Files) -> Names:
    """Often one of the same width: the bytes mean something else."""
    return _edit_entry(
        rng, files, "dtype", lambda entry: rng.choice((_same_width(rng, entry), rng.choice([*ITEM_BYTES]), "F4"))
    )


def header_shape(rng: random.Random, files: Files) -> Names:
    return _edit_entry(rng, files, "shape", lambda entry: _other_shape(rng, entry.get("shape")))


def header_offsets(rng: random.Random, files: Files) -> Names:
    return _edit_entry(rng, files, "data_offsets", lambda entry: _other_offsets(rng, entry.get("data_offsets")))


def header_swap(rng: random.Random, files: Files) -> Names:
    """Two entries exchange what is said of them, all of it or their offsets alone."""
    name, header, raw = _some_shard(rng, files)
    pairs = [pair for pair in header if isinstance(pair[1], Pairs) and pair[0] != "__metadata__"]
    if len(pairs) < 2:
        raise ValueError("too few")
    one, other = rng.sample(pairs, 2)
    if rng.random() < 0.5:
        one[1], other[1] = other[1], one[1]
    else:
        first, second = one[1].get("data_offsets"), other[1].get("data_offsets")
        one[1].put("data_offsets", second)
        other[1].put("data_offsets", first)
    files[name] = join(header, split(raw)[1])
    return {name, one[0], other[0]}


def _edit_entry(rng: random.Random, files: Files, field: str, change: Callable[[Pairs], object]) -> Names:
    name, header, raw = _some_shard(rng, files)
    pairs = [pair for pair in header if isinstance(pair[1], Pairs) and pair[0] != "__metadata__"]
    if not pairs:
        raise ValueError("no entries")
    key, entry = rng.choice(pairs)
    entry.put(field, change(entry))
    files[name] = join(header, split(raw)[1])
    return {name, key}


def _same_width(rng: random.Random, entry: Pairs) -> str:
    width = ITEM_BYTES.get(str(entry.get("dtype")), 4)
    return rng.choice([code for code, size in ITEM_BYTES.items() if size == width])


def _other_shape(rng: random.Random, shape: object) -> object:
    """Many of as many elements."""
    if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
        return odd_value(rng)
    total = math.prod(shape)
    half = next((size for size in (2, 3, 5) if total % size == 0), 1)
    same = (shape[::-1], [total], [1, *shape], [*shape, 1], [half, total // half], [total // half, half], [])
    wrong = (
        [*shape, 0],
        [*shape, 2**62],
        [2**63],
        [2**32, 2**32],
        [0, 2**62],
        [-1, *shape[1:]],
        [size + 1 for size in shape],
    )
    return rng.choice((*same, *wrong, [rng.choice(NUMBERS)], [1] * 70 + shape, [float(size) for size in shape]))


def _other_offsets(rng: random.Random, offsets: object) -> object:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(at, int) for at in offsets):
        return odd_value(rng)
    (begin, end), by = offsets, rng.choice((1, 4, 8, 64, 2**31, 2**63))
    shifted = ([begin + by, end + by], [begin - by, end - by], [begin, end + by], [begin - by, end], [end, begin])
    return rng.choice((*shifted, [0, end - begin], [begin, begin], [], [begin], [begin, end, end], [-end, -begin]))


def _some_shard(rng: random.Random, files: Files) -> tuple[str, Pairs, bytes]:
    names = shard_names(files)
    if not names:
        raise ValueError("no shard")
    name = rng.choice(names)
    raw = files[name]
    header, _ = split(raw)
    assert isinstance(raw, bytes)
    return name, header, raw


# --- the index -------------------------------------------------------------------------------------------------------


def index_document(rng: random.Random, files: Files) -> Names:
    index = parse(files.get(INDEX))
    way = damage_document(rng, index)
    files[INDEX] = rendered(index)
    return {INDEX, *way}


def index_place(rng: random.Random, files: Files) -> Names:
    """A key, or all keys of a shard, said to lie elsewhere."""
    index = parse(files.get(INDEX))
    entries = index.get("weight_map") if isinstance(index, Pairs) else None
    if not isinstance(entries, Pairs) or not entries:
        raise ValueError("no map")
    key, name = rng.choice(entries)
    new = rng.choice((*_elsewhere(str(name)), rng.choice(entries)[1], rng.choice(TEXTS)))
    for pair in entries:
        if pair[0] == key or (pair[1] == name and rng.random() < 0.5):
            pair[1] = new
    files[INDEX] = rendered(index)
    return {INDEX, str(name), str(new), key}


def _elsewhere(name: str) -> tuple[str, ...]:
    ways = (f"../checkpoint/{name}", f"./{name}", f"/etc/{name}", f"sub/{name}", f"{name}/", f" {name}", name.upper())
    return (
        *ways,
        f"{name}\x00",
        f"{name}\n",
        name.replace("/", "\\"),
        ".safetensors",
        f"{'a' * 300}.safetensors",
        CONFIG,
    )
