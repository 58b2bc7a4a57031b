"""Saving: the plan backwards, byte for byte; the old set or the new one, never a mixture."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open

from moebius import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    SaveError,
    Transpose,
    WeightConverter,
    WeightSkip,
    checkpoint,
)
from moebius.checkpoint import fetching, reversing, saving, writing
from moebius.checkpoint.planning import Target
from tests.checkpoint.folders import numbered, planned, read, targets, write
from tests.checkpoint.test_planning import PACK, PACKED, per_expert


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def small_staging(monkeypatch) -> None:
    monkeypatch.setattr(writing, "STAGING_BYTES", 64)
    monkeypatch.setattr(fetching, "STAGING_BYTES", 64)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_then_save_gives_the_same_files(tmp_path, shards):
    source = write(tmp_path / "source", per_expert(), shards)
    plan = planned(source, [PACK], PACKED)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(source)


@pytest.mark.parametrize(
    "operations", [[Transpose(0, 2)], [Interleave(2)], [Interleave(1, undo=True), Transpose(1, 2)]]
)
def test_what_was_rearranged_is_put_back(tmp_path, monkeypatch, operations):
    small_staging(monkeypatch)
    source = write(tmp_path / "source", {"stored": numbered(4, 6, 8)})
    order = (
        {1: (8, 6, 4), 2: (4, 8, 6)}.get(len(operations), ()) if isinstance(operations[-1], Transpose) else (4, 6, 8)
    )
    plan = planned(source, [WeightConverter("stored", "w", operations)], targets(w=order))
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(source)


def test_interleaved_halves_of_two_parameters_go_back_into_one_tensor(tmp_path):
    source = write(tmp_path / "source", {"stored": numbered(8, 3)})
    rule = WeightConverter("stored", ["gate", "up"], [Interleave(0, undo=True), Chunk(0)])
    plan = planned(source, [rule], targets(gate=(4, 3), up=(4, 3)))
    tensors = checkpoint.load(plan)
    assert torch.equal(tensors["up"], numbered(8, 3)[1::2])
    checkpoint.save(plan, tensors, tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(source)


def test_changed_values_are_what_is_written(tmp_path):
    plan = planned(write(tmp_path / "source", per_expert(1)), [PACK], PACKED[:1])
    tensors = checkpoint.load(plan)
    tensors[PACKED[0].name][7, 0] += 1000  # the first gate row of expert 7
    checkpoint.save(plan, tensors, tmp_path / "copy")
    before, after = read(tmp_path / "source"), read(tmp_path / "copy")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"layers.0.block_sparse_moe.experts.7.w1.weight"}


def test_another_dtype_is_written_under_the_same_keys_in_the_same_files(tmp_path):
    source = write(tmp_path / "source", per_expert(1), shards=2)
    plan = planned(source, [PACK], [Target(PACKED[0].name, PACKED[0].shape, "bfloat16")])
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy")
    assert bytes_of(tmp_path / "copy").keys() == bytes_of(source).keys()
    copy, original = read(tmp_path / "copy"), read(source)
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[key], original[key].bfloat16()) for key in copy)
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in copy.values())


def test_tensors_that_the_model_does_not_use_are_carried_over(tmp_path):
    tensors = {"w": numbered(3), "rotary_emb.inv_freq": torch.randn(700_000), "v": numbered(2)}
    source = write(tmp_path / "source", tensors)
    plan = planned(source, [WeightSkip("rotary_emb.inv_freq", "computed")], targets(w=(3,), v=(2,)))
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(source)


def test_a_tied_weight_that_was_stored_twice_is_written_twice(tmp_path):
    source = write(tmp_path / "source", {"embed": numbered(3, 2), "head": numbered(3, 2)})
    plan = planned(source, [], [Target("embed", (3, 2), "float32", aliases=("head",))])
    tensors = checkpoint.load(plan)
    tensors["embed"] += 1
    checkpoint.save(plan, tensors, tmp_path / "copy")
    assert torch.equal(read(tmp_path / "copy")["head"], numbered(3, 2) + 1)


# --- a model that no file stands behind ---


def test_a_new_model_is_written_in_the_published_layout(tmp_path):
    model = {target.name: torch.randn(target.shape) for target in PACKED}
    checkpoint.save(reversing.from_nothing([PACK], PACKED), model, tmp_path / "new")
    assert sorted(read(tmp_path / "new")) == sorted(per_expert())
    loaded = checkpoint.load(planned(tmp_path / "new", [PACK], PACKED))
    assert all(torch.equal(loaded[name], model[name]) for name in model)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_models_are_cut_into_shards(tmp_path):
    model = {target.name: torch.randn(target.shape) for target in PACKED}
    checkpoint.save(reversing.from_nothing([PACK], PACKED, max_shard_bytes=1000), model, tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(per_expert())
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) == 3
    assert shards[0].name == "model-00001-of-00003.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.values())
    loaded = checkpoint.load(planned(tmp_path / "new", [PACK], PACKED))
    assert all(torch.equal(loaded[name], model[name]) for name in model)


def test_tensors_of_mixed_dtypes_are_aligned(tmp_path):
    model = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.randn(5), "c": torch.ones(1, dtype=torch.bfloat16)}
    wanted = [Target(name, tuple(t.shape), str(t.dtype)[6:]) for name, t in model.items()]
    checkpoint.save(reversing.from_nothing([], wanted), model, tmp_path / "new")
    infos = checkpoint.open_files(tmp_path / "new").tensors
    assert all(info.offset % model[name].element_size() == 0 for name, info in infos.items())
    assert all(torch.equal(tensor, model[name]) for name, tensor in read(tmp_path / "new").items())


def test_joined_parameters_come_apart(tmp_path):
    rule = WeightConverter(["k", "v"], "kv", [Concatenate(0, (2, 4))])
    checkpoint.save(reversing.from_nothing([rule], targets(kv=(6, 3))), {"kv": numbered(6, 3)}, tmp_path / "new")
    assert torch.equal(read(tmp_path / "new")["v"], numbered(6, 3)[2:])


def test_merging_needs_no_contiguous_parameter(tmp_path):
    rule = WeightConverter("experts.*.w", "packed", [MergeModulelist(1)])
    model = {"packed": numbered(4, 3, 2).transpose(0, 1)}
    checkpoint.save(reversing.from_nothing([rule], targets(packed=(3, 4, 2))), model, tmp_path / "new")
    assert torch.equal(read(tmp_path / "new")["experts.2.w"], model["packed"][:, 2])


# --- whole or not at all ---


@pytest.fixture
def old(tmp_path):
    """A checkpoint in two shards, with files beside the weights."""
    folder = write(tmp_path / "model", {"a": numbered(4), "b": numbered(4)}, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("old")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "x").write_text("kept")
    return folder


NEW = {"w": torch.ones(3)}


def save_new(folder, **options) -> None:
    checkpoint.save(reversing.from_nothing([], targets(w=(3,))), NEW, folder, **options)


def test_a_new_set_replaces_the_old_one_and_leaves_other_files(old):
    save_new(old, extra_files={"config.json": b"new"})
    assert sorted(path.name for path in old.iterdir()) == [
        "checkpoint-1",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (old / "config.json").read_text() == "new"
    assert (old / "checkpoint-1" / "x").read_text() == "kept"
    assert read(old).keys() == {"w"}
    assert os.listdir(old.parent) == ["model"]


def test_saving_over_the_files_it_was_loaded_from_works(tmp_path):
    source = write(tmp_path / "model", per_expert(1), shards=2)
    before = bytes_of(source)
    plan = planned(source, [PACK], PACKED[:1])
    checkpoint.save(plan, checkpoint.load(plan), source)
    assert bytes_of(source) == before


@pytest.mark.parametrize("call", range(8))
def test_a_failing_write_leaves_the_old_set(old, monkeypatch, call):
    before, calls, write_there = bytes_of(old), [], os.pwrite

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(28, "No space left on device")
        return write_there(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    many = {f"w{n}": torch.ones(3) for n in range(9)}
    wanted = targets(**dict.fromkeys(many, (3,)))
    with pytest.raises(SaveError, match="No space left on device; what stood there is unchanged"):
        checkpoint.save(reversing.from_nothing([], wanted), many, old)
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def test_ctrl_c_leaves_the_old_set(old, monkeypatch):
    before = bytes_of(old)
    monkeypatch.setattr(saving, "_write_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_new(old, extra_files={"config.json": b"new"})
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def test_too_little_space_is_said_before_anything_is_written(old, monkeypatch):
    status = os.statvfs(old)
    full = os.statvfs_result((*status[:4], 0, *status[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(SaveError, match="has 0 bytes free, the save needs 12"):
        save_new(old)
    assert read(old).keys() == {"a", "b"}


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(SaveError, match="is not a folder"):
        save_new(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_the_users_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        save_new(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "new" / "model.safetensors").stat().st_mode) == 0o640
