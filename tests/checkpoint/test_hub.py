"""A hub id opens from the cache as huggingface_hub lays it out; nothing here goes to a network."""

import shutil
from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM, CheckpointError
from moebius.checkpoint import hub
from tests.checkpoint import editing, faults

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    return faults.make_clean(tmp_path_factory.mktemp("hub") / "clean")


@pytest.fixture
def cache(clean, tmp_path) -> Path:
    """models--org--tiny/{refs/main, blobs/*, snapshots/<commit>/* -> blobs}."""
    home = tmp_path / "cache" / "models--org--tiny"
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (home / name).mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(clean.iterdir())):
        shutil.copy(path, home / "blobs" / f"{number:064x}")
        (home / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number:064x}")
    return tmp_path / "cache"


def snapshot(cache: Path) -> Path:
    return cache / "models--org--tiny" / "snapshots" / COMMIT


def refusal(name: str | Path, **options) -> str:
    with pytest.raises(CheckpointError) as raised:
        AutoModelForCausalLM.from_pretrained(name, **options)
    return str(raised.value)


def test_an_id_opens_from_the_cache_with_the_folders_weights(cache, clean):
    cached = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=cache, local_files_only=True)
    plain = AutoModelForCausalLM.from_pretrained(clean)
    assert cached.source.folder == snapshot(cache)
    assert all(torch.equal(a, b) for a, b in zip(cached.parameters(), plain.parameters(), strict=True))


def test_a_snapshot_opens_by_its_path(cache):
    assert AutoModelForCausalLM.from_pretrained(snapshot(cache), device_map="meta").plan


def test_a_commit_may_be_named(cache):
    found = hub.resolve(REPO, cache_dir=cache, local_files_only=True, revision=COMMIT)
    assert found == snapshot(cache)


def test_a_link_that_leaves_the_cache_of_its_model_is_refused(cache, tmp_path):
    link = editing.first_shard(snapshot(cache))
    elsewhere = Path(shutil.copy(link, tmp_path / "elsewhere.safetensors"))
    link.unlink()
    link.symlink_to(elsewhere)
    text = refusal(REPO, cache_dir=cache, local_files_only=True)
    assert f"{link.name}: unreadable: a link out of the folder, to {elsewhere}" in text


def test_a_link_to_another_models_blob_is_refused(cache):
    link = editing.first_shard(snapshot(cache))
    other = cache / "models--org--other" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    shutil.copy(link, other)
    link.unlink()
    link.symlink_to(other)
    assert "a link out of the folder" in refusal(REPO, cache_dir=cache, local_files_only=True)


def test_a_folder_beside_blobs_is_no_cache(clean, tmp_path):
    """Only below snapshots/ may a link lead to the blobs."""
    folder, blobs = tmp_path / "models" / "tiny", tmp_path / "blobs"
    shutil.copytree(clean, folder)
    blobs.mkdir()
    link = editing.first_shard(folder)
    moved = Path(shutil.move(link, blobs))
    link.symlink_to(moved)
    assert "a link out of the folder" in refusal(folder)


def test_a_shard_that_the_cache_lacks_is_named(cache):
    path = editing.first_shard(snapshot(cache))
    path.unlink()
    assert f"{path.name}: missing" in refusal(REPO, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["org/unknown", "unknown"])
def test_an_unknown_id_is_one_line_and_what_to_do(cache, name):
    first, advice = refusal(name, cache_dir=cache, local_files_only=True).splitlines()
    assert first.startswith(f"{name}: no such folder, and not in the hub's cache")
    assert advice == (
        f"what to do: check the name; offline, fetch it first where there is a network: hf download {name}"
    )


def test_an_unknown_revision_is_one_line(cache):
    first, _ = refusal(REPO, cache_dir=cache, local_files_only=True, revision="v9").splitlines()
    assert "not in the hub's cache" in first


@pytest.mark.parametrize("name", ["./nope", "/nope", "~/nope", "a/b/c", "my model", "a\0b", "org//tiny"])
def test_what_cannot_be_an_id_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the hub was asked"))
    assert "no such folder" in refusal(name)


@pytest.mark.parametrize("name", ["x" * 300, "org/.hidden-", "a..b/c"])
def test_what_the_hub_would_not_take_is_one_line(name, cache):
    first, _ = refusal(name, cache_dir=cache, local_files_only=True).splitlines()
    assert "no such folder" in first


def test_only_the_shards_that_the_index_names_are_fetched(cache):
    wanted = hub._weight_files(snapshot(cache))
    assert wanted == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_left_to_the_strict_reader(tmp_path, content):
    (tmp_path / editing.INDEX).write_text(content)
    assert hub._weight_files(tmp_path) in ([], ["model.safetensors"])
