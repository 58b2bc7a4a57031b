"""A corpus of damaged checkpoints: one small function a fault.

Each takes a folder with a clean tiny Qwen3-MoE in four shards (`make_clean`), damages it, and gives the names that a
good message about it holds: the file and the tensor, or the config field.  No torch, so that any loader can be tried.

E experts, H hidden, I expert width.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.checkpoint.editing import (
    INDEX,
    Stored,
    edit_config,
    first_shard,
    flip_bit,
    join,
    pack,
    remove,
    rename,
    set_num_experts,
    shard_of,
    split,
    store,
    unpack,
    values_of,
    weight_map,
    write_weight_map,
)
from tests.families import make_oracle, save_oracle

EXPERTS = "model.layers.0.mlp.experts"
DOWN = f"{EXPERTS}.2.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
NUM_EXPERTS, NUM_LAYERS = 4, 2

Names = tuple[str, ...]


@dataclass(frozen=True)
class NamedFault:
    """number: as the documentation's table counts.  damage: does it to a folder."""

    number: str
    title: str
    damage: Callable[[Path], Names]


def make_clean(folder: Path) -> Path:
    """The undamaged checkpoint: float32, E = 4, two layers, four shards and an index, as transformers writes it."""
    oracle = make_oracle("qwen3_moe", num_experts=NUM_EXPERTS, num_experts_per_tok=2)
    return save_oracle(oracle, folder, max_shard_size="150KB")


# --- 1-9: a shard's bytes ----------------------------------------------------------------------------------------


def truncate_data(folder: Path) -> Names:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return (path.name,)


def truncate_header(folder: Path) -> Names:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:200])
    return (path.name,)


def empty_shard(folder: Path) -> Names:
    path = first_shard(folder)
    path.write_bytes(b"")
    return (path.name,)


def remove_shard(folder: Path) -> Names:
    path = shard_of(folder, NORM)
    path.unlink()
    return (path.name,)


def flip_data_bit(folder: Path) -> Names:
    """The exponent's fourth bit of one weight: it becomes 65,536 times as large or as small."""
    path = shard_of(folder, DOWN)
    header, data = split(path)
    start = path.stat().st_size - len(data) + header[DOWN]["data_offsets"][0]
    flip_bit(path, start + 3, 3)
    return path.name, DOWN


def flip_header_bit(folder: Path) -> Names:
    path = first_shard(folder)
    flip_bit(path, 9, 0)
    return (path.name,)


def huge_header(folder: Path) -> Names:
    path = first_shard(folder)
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    return (path.name,)


def html_page(folder: Path) -> Names:
    path = first_shard(folder)
    path.write_text("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>401</body></html>\n")
    return (path.name,)


def lfs_pointer(folder: Path) -> Names:
    path = first_shard(folder)
    size = path.stat().st_size
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n")
    return (path.name,)


# --- 10-16: the index --------------------------------------------------------------------------------------------


def _move_out(folder: Path) -> Path:
    """Moves the first shard beside the folder, where a checkpoint has no business."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    return Path(shutil.move(first_shard(folder), outside))


def _point_index(folder: Path, old: str, new: str) -> None:
    write_weight_map(folder, {key: new if name == old else name for key, name in weight_map(folder).items()})


def parent_name(folder: Path) -> Names:
    moved = _move_out(folder)
    _point_index(folder, moved.name, f"../outside/{moved.name}")
    return INDEX, f"../outside/{moved.name}"


def absolute_name(folder: Path) -> Names:
    moved = _move_out(folder)
    _point_index(folder, moved.name, str(moved))
    return INDEX, str(moved)


def outside_link(folder: Path) -> Names:
    moved = _move_out(folder)
    (folder / moved.name).symlink_to(moved)
    return (moved.name,)


def wrong_shard(folder: Path) -> Names:
    path = shard_of(folder, NORM)
    write_weight_map(folder, weight_map(folder) | {NORM: first_shard(folder).name})
    return INDEX, path.name, NORM


def omitted_key(folder: Path) -> Names:
    path = shard_of(folder, NORM)
    write_weight_map(folder, {key: name for key, name in weight_map(folder).items() if key != NORM})
    return INDEX, path.name, NORM


def broken_index(folder: Path) -> Names:
    path = folder / INDEX
    path.write_text(path.read_text()[:-40])
    return (INDEX,)


def no_weight_map(folder: Path) -> Names:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}}))
    return INDEX, "weight_map"


# --- 17-23: single tensors ---------------------------------------------------------------------------------------


def missing_expert(folder: Path) -> Names:
    remove(folder, DOWN)
    return (DOWN,)


def _change(folder: Path, key: str, change: Callable[[Stored], Stored]) -> Names:
    path = shard_of(folder, key)
    store(path, {key: change(unpack(path)[key])})
    return path.name, key


def nan_weight(folder: Path) -> Names:
    nan = np.float32("nan").tobytes()
    return _change(folder, DOWN, lambda tensor: replace(tensor, data=nan + tensor.data[4:]))


def _shortened(tensor: Stored) -> Stored:
    """Without its last row."""
    rows, *rest = tensor.shape
    return replace(tensor, shape=[rows - 1, *rest], data=tensor.data[: len(tensor.data) // rows * (rows - 1)])


def expert_shape(folder: Path) -> Names:
    return _change(folder, DOWN, _shortened)


def norm_shape(folder: Path) -> Names:
    return _change(folder, NORM, _shortened)


def float16_expert(folder: Path) -> Names:
    return _change(
        folder, DOWN, lambda tensor: replace(tensor, dtype="F16", data=values_of(tensor).astype(np.float16).tobytes())
    )


def int8_expert(folder: Path) -> Names:
    def quantized(tensor: Stored) -> Stored:
        values = values_of(tensor)
        return replace(tensor, dtype="I8", data=np.rint(values / abs(values).max() * 127).astype(np.int8).tobytes())

    return _change(folder, DOWN, quantized)


def extra_expert(folder: Path) -> Names:
    path = shard_of(folder, DOWN)
    store(path, {DOWN.replace(".2.", ".9."): unpack(path)[DOWN]})
    return path.name, DOWN.replace(".2.", ".9.")


def no_metadata(folder: Path) -> Names:
    for name in set(weight_map(folder).values()):
        header, data = split(folder / name)
        del header["__metadata__"]
        join(folder / name, json.dumps(header), data)
    return ()


# --- 25-30: the config -------------------------------------------------------------------------------------------


def one_layer_more(folder: Path) -> Names:
    edit_config(folder, num_hidden_layers=NUM_LAYERS + 1)
    return (f"model.layers.{NUM_LAYERS}.*",)


def one_layer_less(folder: Path) -> Names:
    edit_config(folder, num_hidden_layers=NUM_LAYERS - 1)
    return (f"model.layers.{NUM_LAYERS - 1}.*",)


def more_experts(folder: Path) -> Names:
    set_num_experts(folder, 2 * NUM_EXPERTS)
    return (f"{EXPERTS}.*.down_proj.weight",)


def fewer_experts(folder: Path) -> Names:
    set_num_experts(folder, NUM_EXPERTS // 2)
    return (DOWN,)


def more_experts_a_token(folder: Path) -> Names:
    edit_config(folder, num_experts_per_tok=NUM_EXPERTS + 1)
    return ("num_experts_per_tok",)


def negative_experts(folder: Path) -> Names:
    set_num_experts(folder, -1)
    return "num_experts", "-1"


def text_for_a_size(folder: Path) -> Names:
    edit_config(folder, hidden_size="x")
    return "hidden_size", "x"


# --- 31-37: the set as a whole -----------------------------------------------------------------------------------


def key_twice(folder: Path) -> Names:
    """The second entry calls the same bytes integers."""
    path = shard_of(folder, DOWN)
    header, data = split(path)
    second = json.dumps({DOWN: header[DOWN] | {"dtype": "I32"}})
    join(path, json.dumps(header)[:-1] + ", " + second[1:], data)
    return path.name, DOWN


def key_in_two_shards(folder: Path) -> Names:
    home, other = shard_of(folder, DOWN), shard_of(folder, NORM)
    zeros = replace(unpack(home)[DOWN], data=bytes(len(unpack(home)[DOWN].data)))
    pack(other, unpack(other) | {DOWN: zeros})
    return home.name, other.name, DOWN


def _shift_tail(folder: Path, shift: int) -> tuple[str, str, str]:
    """Moves the last tensor of the first shard by `shift` bytes; gives the file, the last key and the one before."""
    path = first_shard(folder)
    header, data = split(path)
    last, before = sorted(header.keys() - {"__metadata__"}, key=lambda key: -header[key]["data_offsets"][0])[:2]
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + shift, end + shift]
    join(path, json.dumps(header), data[: begin + min(shift, 0)] + bytes(max(shift, 0)) + data[begin:])
    return path.name, last, before


def overlap(folder: Path) -> Names:
    return _shift_tail(folder, -16)


def gap(folder: Path) -> Names:
    return _shift_tail(folder, 16)


def _renumber_expert(folder: Path, old: int, new: int) -> Names:
    for key in [key for key in weight_map(folder) if key.startswith(f"{EXPERTS}.{old}.")]:
        rename(folder, key, key.replace(f"experts.{old}.", f"experts.{new}."))
    return f"{EXPERTS}.{old}", f"{EXPERTS}.{new}.down_proj.weight"


def gap_at_the_end(folder: Path) -> Names:
    return _renumber_expert(folder, NUM_EXPERTS - 1, NUM_EXPERTS)


def gap_in_the_middle(folder: Path) -> Names:
    return _renumber_expert(folder, 1, NUM_EXPERTS)


def no_down_proj(folder: Path) -> Names:
    remove(folder, *(key for key in weight_map(folder) if key.endswith("down_proj.weight")))
    return (f"{EXPERTS}.*.down_proj.weight",)


def mixed_layouts(folder: Path) -> Names:
    """Gate and up of the first layer a second time, fused, with other values."""
    parts = [f"{EXPERTS}.{expert}.{name}_proj.weight" for expert in range(NUM_EXPERTS) for name in ("gate", "up")]
    stored = [unpack(shard_of(folder, key))[key] for key in parts]
    width, hidden_size = stored[0].shape
    path, fused = shard_of(folder, parts[0]), f"{EXPERTS}.gate_up_proj"
    data = bytes(sum(len(tensor.data) for tensor in stored))
    store(path, {fused: Stored("F32", [NUM_EXPERTS, 2 * width, hidden_size], data)})
    return fused, parts[0]


def only_pickle(folder: Path) -> Names:
    import torch

    tensors = {
        key: stored for name in set(weight_map(folder).values()) for key, stored in unpack(folder / name).items()
    }
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    weights = {
        key: torch.frombuffer(bytearray(stored.data), dtype=torch.float32).view(stored.shape)
        for key, stored in tensors.items()
    }
    torch.save(weights, folder / "pytorch_model.bin")
    return ("pytorch_model.bin",)


FAULTS = (
    NamedFault("1", "a shard's data truncated", truncate_data),
    NamedFault("2", "a shard's header truncated", truncate_header),
    NamedFault("3", "an empty shard", empty_shard),
    NamedFault("4", "a shard of the index is missing", remove_shard),
    NamedFault("5", "one bit flipped in the data", flip_data_bit),
    NamedFault("6", "one bit flipped in a header", flip_header_bit),
    NamedFault("7", "header length 2^62", huge_header),
    NamedFault("8", "an HTML page instead of a shard", html_page),
    NamedFault("9", "a git-LFS pointer instead of a shard", lfs_pointer),
    NamedFault("10", "`weight_map` leads out with `../`", parent_name),
    NamedFault("11", "`weight_map` holds an absolute path", absolute_name),
    NamedFault("12", "a shard is a symlink out of the folder", outside_link),
    NamedFault("13", "`weight_map` names the wrong shard for a key", wrong_shard),
    NamedFault("14", "`weight_map` omits a key that a shard holds", omitted_key),
    NamedFault("15", "the index is broken JSON", broken_index),
    NamedFault("16", "the index has no `weight_map`", no_weight_map),
    NamedFault("17", "one expert's tensor missing", missing_expert),
    NamedFault("18", "NaN in a weight", nan_weight),
    NamedFault("19", "wrong shape of one expert", expert_shape),
    NamedFault("20", "wrong shape of a norm", norm_shape),
    NamedFault("21", "one expert in float16 among float32", float16_expert),
    NamedFault("22", "one expert in int8 without scales", int8_expert),
    NamedFault("23", "an extra expert (index 9 of 4)", extra_expert),
    NamedFault("24", "no `__metadata__` in the headers", no_metadata),
    NamedFault("25", "`num_hidden_layers` one more than the files hold", one_layer_more),
    NamedFault("26", "`num_hidden_layers` one less than the files hold", one_layer_less),
    NamedFault("27", "`num_experts` 8, the files hold 4", more_experts),
    NamedFault("28", "`num_experts` 2, the files hold 4", fewer_experts),
    NamedFault("29", "`num_experts_per_tok` above `num_experts`", more_experts_a_token),
    NamedFault("30a", "`num_experts` -1", negative_experts),
    NamedFault("30b", '`hidden_size` "x"', text_for_a_size),
    NamedFault("31", "a key twice in one header", key_twice),
    NamedFault("32", "one key in two shards", key_in_two_shards),
    NamedFault("33a", "two tensors' bytes overlap", overlap),
    NamedFault("33b", "two tensors' bytes leave a gap", gap),
    NamedFault("34a", "expert indices with a gap (0, 1, 2, 4)", gap_at_the_end),
    NamedFault("34b", "expert indices with a gap (0, 2, 3, 4)", gap_in_the_middle),
    NamedFault("35", "all `down_proj` missing", no_down_proj),
    NamedFault("36", "per-expert and fused layouts in one layer", mixed_layouts),
    NamedFault("37", "only a pickled `pytorch_model.bin`", only_pickle),
)
