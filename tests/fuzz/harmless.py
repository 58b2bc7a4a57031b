"""Changes after which a checkpoint means what it did, so that it must load to the same tensors."""

import json
import random
from collections.abc import Callable, Mapping

from tests.fuzz.documents import (
    CONFIG,
    INDEX,
    SINGLE,
    Files,
    Pairs,
    Shard,
    join,
    pack,
    pack_all,
    parse,
    render,
    rendered,
    shard_names,
    split,
    unpack_all,
)
from tests.fuzz.oddities import ANY_NAME, Names

INERT = {
    "transformers_version": "9.9",
    "_name_or_path": "x",
    "use_cache": None,
    "id2label": {"0": "a"},
    "temperature": 0.5,
}


def reordered_header(rng: random.Random, files: Files) -> Names:
    name = rng.choice(shard_names(files))
    header, data = split(files[name])
    rng.shuffle(header)
    files[name] = join(header, data)
    return ANY_NAME


def spaced_header(rng: random.Random, files: Files) -> Names:
    """White space wherever JSON lets it stand but in front, where the format wants a brace."""
    name = rng.choice(shard_names(files))
    header, data = split(files[name])
    text = json.dumps(json.loads(render(header)), indent=rng.randint(1, 4)).encode() + b" \n\t"[: rng.randint(0, 3)]
    files[name] = len(text).to_bytes(8, "little") + text + data
    return ANY_NAME


def padded_header(rng: random.Random, files: Files) -> Names:
    name = rng.choice(shard_names(files))
    files[name] = join(*split(files[name]), rng.choice((1, 16, 64, 4096)))
    return ANY_NAME


def escaped_header(rng: random.Random, files: Files) -> Names:
    """Letters of names written as numbers."""
    name = rng.choice(shard_names(files))
    header, data = split(files[name])
    letter = rng.choice("aeort")
    text = render(header).replace(f"{letter}", f"\\u{ord(letter):04x}").replace("d\\u0074yp\\u0065", "dtype").encode()
    json.loads(text)
    files[name] = len(text).to_bytes(8, "little") + text + data
    return ANY_NAME


def other_metadata(rng: random.Random, files: Files) -> Names:
    name = rng.choice(shard_names(files))
    header, data = split(files[name])
    header.drop("__metadata__")
    if rng.random() < 0.7:
        header.insert(rng.randint(0, len(header)), ["__metadata__", Pairs([["a", ""], ["", "\n\U0001f600" * 9]])])
    files[name] = join(header, data)
    return ANY_NAME


def reordered_data(rng: random.Random, files: Files) -> Names:
    """The tensors of one shard in another order."""
    shards = unpack_all(files)
    name = rng.choice([*shards])
    files[name] = pack(_shuffled(rng, shards[name]))
    return ANY_NAME


def dealt_anew(rng: random.Random, files: Files) -> Names:
    """All tensors in one file, or in other files of other names, with an index."""
    tensors = {key: tensor for shard in unpack_all(files).values() for key, tensor in shard.items()}
    for name in [*shard_names(files), *([INDEX] if INDEX in files else [])]:
        del files[name]
    count = rng.randint(1, 4)
    if count > 1:
        files[INDEX] = b""
    names = [SINGLE] if count == 1 else [f"{rng.choice('aß 0')}-{at}.safetensors" for at in range(count)]
    dealt: dict[str, Shard] = {name: {} for name in names}
    for at, (key, tensor) in enumerate(_shuffled(rng, tensors).items()):
        dealt[names[at % count]][key] = tensor
    pack_all(files, dealt)
    return ANY_NAME


def reordered_index(rng: random.Random, files: Files) -> Names:
    index = parse(files.get(INDEX))
    rng.shuffle(index.get("weight_map"))
    rng.shuffle(index)
    files[INDEX] = rendered(index)
    return ANY_NAME


def other_index_fields(rng: random.Random, files: Files) -> Names:
    index = parse(files.get(INDEX))
    index.put("metadata", rng.choice((None, 5, Pairs([["total_size", -1]]), "x")))
    index.put("more", [1])
    files[INDEX] = rendered(index)
    return ANY_NAME


def respelled_config(rng: random.Random, files: Files) -> Names:
    config = parse(files.get(CONFIG))
    rng.shuffle(config)
    files[CONFIG] = json.dumps(json.loads(render(config)), indent=rng.choice((None, 1, 2))).encode() + b"\n"
    return ANY_NAME


def inert_field(rng: random.Random, files: Files) -> Names:
    config = parse(files.get(CONFIG))
    name = rng.choice([*INERT])
    config.put(name, INERT[name])
    files[CONFIG] = rendered(config)
    return ANY_NAME


def other_files(rng: random.Random, files: Files) -> Names:
    """Beside the weights, and of no concern to them."""
    names = ("README.md", "tokenizer.json", "pytorch_model.bin", "notes.safetensors", ".hidden", "model.gguf")
    files[rng.choice(names)] = rng.randbytes(40)
    return ANY_NAME


def _shuffled(rng: random.Random, tensors: Shard) -> Shard:
    return dict(rng.sample(list(tensors.items()), len(tensors)))


HARMLESS: Mapping[str, Callable[[random.Random, Files], Names]] = {
    change.__name__: change
    for change in (
        *(reordered_header, spaced_header, padded_header, escaped_header, other_metadata, reordered_data),
        *(dealt_anew, reordered_index, other_index_fields, respelled_config, inert_field, other_files),
    )
}
