"""Where a save goes: what else stands there stays, one saver at a time, also where folders cannot be exchanged."""

import errno
import logging
import os
import platform
import stat
import threading
from pathlib import Path

import pytest
import torch

from moebius import SaveError, checkpoint
from moebius.checkpoint import atomic, inplace, locking, mapping, reversing, saving
from moebius.checkpoint.planning import Target
from tests.checkpoint.folders import numbered, planned, read, targets, write
from tests.checkpoint.test_ways import RULES, SHAPES, mapped_bytes, stored

NEW = {"w": torch.ones(3)}
INDEX = "model.safetensors.index.json"


def save_new(folder, **options) -> None:
    checkpoint.save(reversing.from_nothing([], targets(w=(3,))), NEW, folder, **options)


@pytest.fixture
def old(tmp_path) -> Path:
    """A checkpoint in two shards, with files and folders beside the weights."""
    folder = write(tmp_path / "parent" / "model", {"a": numbered(4), "b": numbered(4)}, shards=2)
    (folder / "config.json").write_text('{"old": 1}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "checkpoint-1" / "deep").mkdir(parents=True)
    (folder / "checkpoint-1" / "deep" / "x").write_text("kept")
    return folder


@pytest.fixture
def no_exchange(monkeypatch):
    def cannot(one, other):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(atomic, "exchange", cannot)


# --- what else stands there ---


def test_folders_and_links_stay_what_they_are(old):
    inode = (old / "checkpoint-1").stat().st_ino
    save_new(old, extra_files={"config.json": b"{}"})
    assert (old / "checkpoint-1").stat().st_ino == inode
    assert not (old / "checkpoint-1").is_symlink()
    assert (old / "checkpoint-1" / "deep" / "x").read_text() == "kept"
    assert os.readlink(old / "link") == "tokenizer.json"
    assert read(old).keys() == {"w"}
    assert os.listdir(old.parent) == ["model"]


def test_what_arrives_while_it_is_saved_is_kept_too(old, monkeypatch):
    exchange = atomic.exchange

    def late(one, other):
        if other == old:
            (old / "notes.txt").write_text("late")
            (old / "checkpoint-2").mkdir()
        exchange(one, other)

    monkeypatch.setattr(atomic, "exchange", late)
    save_new(old)
    assert (old / "notes.txt").read_text() == "late"
    assert (old / "checkpoint-2").is_dir()
    assert not (old / "checkpoint-2").is_symlink()


def test_files_that_may_not_be_linked_move(old, monkeypatch):
    def forbidden(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", forbidden)
    save_new(old)
    assert (old / "tokenizer.json").read_text() == "{}"
    assert not (old / "tokenizer.json").is_symlink()
    assert os.readlink(old / "link") == "tokenizer.json"


def test_shards_of_any_name_go_with_the_set_that_named_them(tmp_path):
    folder = write(tmp_path / "model", {"a": numbered(4)})
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"a": "weights.safetensors"}}')
    save_new(folder)
    assert os.listdir(folder) == ["model.safetensors"]


def test_the_folder_keeps_its_mode(old):
    old.chmod(0o2750)
    save_new(old)
    assert stat.S_IMODE(old.stat().st_mode) == 0o2750


def test_a_folder_in_the_way_of_the_new_set_is_not_removed(old):
    (atomic.beside(old) / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"\.model\.saving: File exists; what stood there is unchanged"):
        save_new(old)
    assert (atomic.beside(old) / "checkpoint-1").is_dir()
    assert read(old).keys() == {"a", "b"}


# --- where folders cannot be exchanged ---


def same_config() -> dict:
    return {"extra_files": {"config.json": b'{ "old": 1 }', "generation_config.json": b"{}"}}


def two_shards() -> reversing.SavePlan:
    return reversing.from_nothing([], targets(w=(3,), v=(3,)), max_shard_bytes=12)


def test_shards_take_free_names_and_the_index_names_them(old, no_exchange):
    for ending in (".2", "", ".2"):
        checkpoint.save(two_shards(), {"w": torch.ones(3), "v": torch.zeros(3)}, old, **same_config())
        shards = sorted(path.name for path in old.glob("*.safetensors"))
        assert shards == [f"model-0000{n}-of-00002{ending}.safetensors" for n in (1, 2)]
        assert checkpoint.open_files(old).tensors.keys() == {"w", "v"}
    assert (old / "checkpoint-1" / "deep" / "x").read_text() == "kept"
    assert (old / "generation_config.json").read_text() == "{}"
    assert {path.name for path in old.iterdir() if path.name.startswith(".")} == set()
    assert os.listdir(old.parent) == ["model"]


def test_a_set_that_one_renaming_cannot_replace_is_refused(old, no_exchange):
    with pytest.raises(SaveError) as caught:
        save_new(old, extra_files={"config.json": b'{"new": 1}'})
    assert {(fault.where, fault.what) for fault in caught.value.faults} == {
        ("model.safetensors", "another kind of set"),
        ("config.json", "differs"),
    }
    assert "save to a new folder" in str(caught.value)
    assert read(old).keys() == {"a", "b"}


def test_a_folder_without_weights_takes_any_set(tmp_path, no_exchange):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"old": 1}')
    save_new(tmp_path / "model", extra_files={"config.json": b"{}"})
    assert read(tmp_path / "model").keys() == {"w"}
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_a_place_of_a_mount_is_not_exchanged(old, monkeypatch, tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 98:0 / {old.parent}/model/checkpoint-1 rw - ext4 /dev/x rw\n")
    monkeypatch.setattr(atomic, "_MOUNTS", mounts)
    inode = old.stat().st_ino
    checkpoint.save(two_shards(), {"w": torch.ones(3), "v": torch.zeros(3)}, old, **same_config())
    assert old.stat().st_ino == inode
    assert checkpoint.open_files(old).tensors.keys() == {"w", "v"}
    assert not (old / inplace.INSIDE).exists()


# --- one saver at a time ---


def test_of_two_savers_at_once_one_is_refused(tmp_path, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    write_file = saving._write_file

    def waiting(path, content):
        inside.set()
        assert go_on.wait(20)
        write_file(path, content)

    monkeypatch.setattr(saving, "_write_file", waiting)
    first = threading.Thread(target=save_new, args=(tmp_path / "model",), kwargs={"extra_files": {"a.json": b"1"}})
    first.start()
    try:
        assert inside.wait(20)
        with pytest.raises(SaveError, match=f"model is being saved by process {os.getpid()} on {platform.node()}"):
            save_new(tmp_path / "model")
    finally:
        go_on.set()
        first.join()
    assert read(tmp_path / "model").keys() == {"w"}
    save_new(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_the_lock_of_a_dead_saver_is_taken_over_and_its_files_are_cleared_away(old, caplog):
    lock = Path(f"{atomic.beside(old)}.lock")
    lock.write_text(f"4194300 {platform.node()}\n")
    atomic.beside(old).mkdir()
    (atomic.beside(old) / "model-00001-of-00009.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        save_new(old)
    assert f"process 4194300 on {platform.node()} did not finish saving it; its lock is taken over" in caplog.text
    assert os.listdir(old.parent) == ["model"]


def test_the_lock_of_another_host_holds_on_a_shared_file_system(old, monkeypatch):
    lock = Path(f"{atomic.beside(old)}.lock")
    lock.write_text("7 elsewhere\n")
    monkeypatch.setattr(mapping, "LOCAL", set())
    with pytest.raises(SaveError, match=f"being saved by process 7 on elsewhere; nothing was written\n.*remove {lock}"):
        save_new(old)
    assert lock.read_text() == "7 elsewhere\n"
    monkeypatch.undo()
    save_new(old)
    assert not lock.exists()


def test_where_there_are_no_locks_a_living_owner_is_respected(old, monkeypatch):
    def missing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", missing)
    lock = Path(f"{atomic.beside(old)}.lock")
    lock.write_text(f"{os.getppid()} {platform.node()}\n")
    with pytest.raises(SaveError, match="is being saved"):
        save_new(old)
    lock.write_text(f"4194300 {platform.node()}\n")
    save_new(old)
    assert os.listdir(old.parent) == ["model"]


def test_an_unwritable_parent_is_not_needed(old, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != old.parent)
    with pytest.raises(SaveError, match="another kind of set"):
        save_new(old)
    checkpoint.save(two_shards(), {"w": torch.ones(3), "v": torch.zeros(3)}, old, **same_config())
    assert checkpoint.open_files(old).tensors.keys() == {"w", "v"}
    assert [name for name in os.listdir(old) if name.startswith(".")] == []


# --- over the files that are mapped ---


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_model_of_mapped_pages_is_saved_over_their_files(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(saving, "exchangeable", lambda folder: False)
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    folder = write(tmp_path / "model", stored(), 3)
    plan = planned(folder, RULES, [Target(name, shape, "bfloat16") for name, shape in SHAPES.items()])
    tensors = checkpoint.load(plan)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    assert mapped_bytes(tmp_path) > 100_000
    wanted["norm"] += 1
    tensors["norm"] += 1
    for _ in range(2):
        checkpoint.save(plan, tensors, folder)
        plan = planned(folder, RULES, list(plan.targets.values()))
    found = checkpoint.load(plan)
    assert all(torch.equal(tensors[name], wanted[name]) and torch.equal(found[name], wanted[name]) for name in wanted)
