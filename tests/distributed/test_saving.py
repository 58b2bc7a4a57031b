"""Saved by several processes: the files that one would write, or else what stood there, and the same error on all."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moebius import (
    AutoModelForCausalLM,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightSkip,
    checkpoint,
)
from moebius.auto import open_checkpoint
from moebius.checkpoint import reversing, saving
from moebius.checkpoint.checksums import SUMS_FILE
from moebius.checkpoint.owning import owned
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.publishing import publish
from moebius.checkpoint.quantizing import Packing
from moebius.distributed.layout import ExpertLayout
from moebius.errors import MoebiusError
from moebius.layers.quantizing import segments_of
from moebius.quantization.config import QuantizationConfig
from tests.checkpoint.folders import planned, targets, write
from tests.distributed.pool import run_ranks
from tests.families import tiny_config

EXPERTS = 5
RULES = [
    WeightConverter("e.*.w", "experts.up", [MergeModulelist(0)]),
    WeightConverter("packed", "experts.down", [Transpose(1, 2), Interleave(1, undo=True)]),
    WeightConverter("last", "experts.bias", [Transpose(0, 1)]),
    WeightSkip("rotary", "computed"),
]
SHAPES = {
    "experts.up": (EXPERTS, 40, 30),
    "experts.down": (EXPERTS, 20, 12),
    "experts.bias": (EXPERTS, 7),
    "embed": (100, 30),
    "norm": (30,),
}
every_size = pytest.mark.parametrize("size", [2, 3, 4])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Experts a key each; in one tensor, transposed and interleaved; along the last axis.  In three shards."""
    tensors = {f"e.{e}.w": torch.randn(40, 30) for e in range(EXPERTS)} | {"packed": torch.randn(EXPERTS, 12, 20)}
    tensors |= {"last": torch.randn(7, EXPERTS), "embed": torch.randn(100, 30), "norm": torch.randn(30)}
    return write(tmp_path_factory.mktemp("source"), tensors | {"rotary": torch.randn(50)}, shards=3)


@pytest.fixture
def old(tmp_path) -> Path:
    """A set that stands where the new one is to go."""
    folder = write(tmp_path / "model", {"a": torch.ones(4), "b": torch.ones(4)}, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def plan_of(folder: Path, dtype: str = "float32") -> Plan:
    return planned(folder, RULES, [Target(name, shape, dtype) for name, shape in SHAPES.items()])


def boxes_of(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, range]:
    layouts = {name: ExpertLayout(shape[0], size) for name, shape in shapes.items() if "experts." in name}
    return {name: layout.experts_of(rank) for name, layout in layouts.items()}


def shapes_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: target.shape for name, target in plan.targets.items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "config.json"}


# --- the files of one process ---


def save_share(ranks: Any, source: Path, folder: Path, dtype: str, copies: int, **options: Any) -> None:
    """Loads and saves what is this rank's; the experts are spread over size / copies ranks."""
    size = ranks.size // copies  # which share the experts
    plan, boxes = plan_of(source, dtype), boxes_of(SHAPES, ranks.rank % size, size)
    checkpoint.save(plan, checkpoint.load(owned(plan, boxes)), folder, team=ranks, boxes=boxes, **options)


def save_share_with_sums(ranks: Any, source: Path, folder: Path) -> None:
    save_share(ranks, source, folder, "float32", 1, checksums=True, extra_files={"notes.txt": b"of rank 0"})


@every_size
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_written_as_one_process_writes_it(source, tmp_path, size, dtype):
    plan = plan_of(source, dtype)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "one")
    run_ranks(size, save_share, source, tmp_path / "many", dtype, 1)
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["many", "one"]


def test_of_ranks_with_the_same_experts_one_writes(source, tmp_path):
    run_ranks(4, save_share, source, tmp_path / "many", "float32", 2)
    assert bytes_of(tmp_path / "many") == bytes_of(source)


def test_checksums_are_those_of_the_finished_files(source, tmp_path):
    plan = plan_of(source)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "one", checksums=True)
    run_ranks(2, save_share_with_sums, source, tmp_path / "many")
    found = bytes_of(tmp_path / "many")
    assert found.pop("notes.txt") == b"of rank 0"
    assert SUMS_FILE in found
    assert found == bytes_of(tmp_path / "one")


def test_saved_on_four_loaded_on_three_saved_on_one_it_is_what_it_was(source, tmp_path):
    run_ranks(4, save_share, source, tmp_path / "four", "float32", 1)
    run_ranks(3, save_share, tmp_path / "four", tmp_path / "three", "float32", 1)
    plan = plan_of(tmp_path / "three")
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "one")
    assert bytes_of(tmp_path / "one") == bytes_of(source)


def save_over(ranks: Any, folder: Path) -> None:
    plan, boxes = plan_of(folder), boxes_of(SHAPES, ranks.rank, ranks.size)
    tensors = checkpoint.load(owned(plan, boxes))
    grown = {name: tensor + 1 for name, tensor in tensors.items()}
    checkpoint.save(plan, grown, folder, team=ranks, boxes=boxes)


def save_over_in_place(ranks: Any, folder: Path) -> None:
    """As on a file system that cannot exchange folders: shards take names that only rank 0 sees are free."""
    with mock.patch.object(saving, "exchangeable", return_value=False):
        save_over(ranks, folder)


@pytest.mark.parametrize("way", [save_over, save_over_in_place])
def test_the_files_it_was_loaded_from_are_replaced(source, tmp_path, way):
    plan = plan_of(source)
    folder = tmp_path / "model"
    checkpoint.save(plan, before := checkpoint.load(plan), folder)
    run_ranks(3, way, folder)
    after = checkpoint.load(plan_of(folder))
    assert all(torch.equal(after[name], before[name] + 1) for name in before)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def save_new(ranks: Any, folder: Path, rows: bool) -> None:
    """A model that no file stands behind; rows: everything else is spread over the ranks too, by its rows."""
    torch.manual_seed(7)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    boxes = boxes_of(SHAPES, ranks.rank, ranks.size)
    boxes |= {n: ExpertLayout(SHAPES[n][0], ranks.size).experts_of(ranks.rank) for n in ("embed", "norm") if rows}
    tensors = {n: t[boxes[n].start : boxes[n].stop].clone() if n in boxes else t for n, t in whole.items()}
    plan = reversing.from_nothing(RULES, targets(**SHAPES), max_shard_bytes=12_000)
    checkpoint.save(plan, tensors, folder, team=ranks, boxes=boxes)


@every_size
@pytest.mark.parametrize("rows", [False, True])
def test_a_new_model_is_written_as_one_process_writes_it(tmp_path, size, rows):
    torch.manual_seed(7)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    plan = reversing.from_nothing(RULES, targets(**SHAPES), max_shard_bytes=12_000)
    checkpoint.save(plan, whole, tmp_path / "one")
    assert len(plan.shards) > 2
    run_ranks(size, save_new, tmp_path / "many", rows)
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")


def save_quantized(ranks: Any, source: Path, folder: Path, form: str) -> None:
    opened = open_checkpoint(source, quantization=QuantizationConfig(form))
    shapes = shapes_of(opened.plan)
    boxes = boxes_of(shapes, ranks.rank, ranks.size)
    published = publish(
        opened.family.rules(opened.config),
        checkpoint.load(owned(opened.plan, boxes)),
        {name: Packing(held, segments_of(name)) for name, held in opened.held.items()},
        200_000,
        shapes=shapes,
        boxes=boxes,
    )
    checkpoint.save(published.plan, published.tensors, folder, team=ranks, boxes=published.boxes)


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "int4"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")])
def test_quantized_models_are_published_as_one_process_publishes_them(tmp_path, family, form):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization=form)
    model.save_pretrained(tmp_path / "one", max_shard_size=200_000)
    run_ranks(3, save_quantized, source, tmp_path / "many", form)
    one = bytes_of(tmp_path / "one")
    assert bytes_of(tmp_path / "many") == {name: one[name] for name in one if name != "generation_config.json"}


# --- or what stood there ---


def error_of(ranks: Any, source: Path, folder: Path, **options: Any) -> str:
    """What a save ends with on this rank."""
    plan, boxes = plan_of(source), boxes_of(SHAPES, ranks.rank, ranks.size)
    tensors = checkpoint.load(owned(plan, boxes))
    try:
        checkpoint.save(plan, tensors, folder, team=ranks, boxes=boxes, **options)
    except MoebiusError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fails_to_write(ranks: Any, source: Path, folder: Path, failing: int, call: int) -> str:
    """The `failing` rank's disk is full from one of its writes on."""
    calls, write_there = [], os.pwrite

    def pwrite(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(28, "No space left on device")
        return write_there(*arguments)

    if ranks.rank != failing:
        return error_of(ranks, source, folder)
    with mock.patch.object(os, "pwrite", pwrite):
        return error_of(ranks, source, folder)


@pytest.mark.parametrize(("failing", "call"), [(0, 0), (0, 5), (1, 0), (2, 3)])
def test_a_disk_that_is_full_for_one_rank_is_every_ranks_error_and_the_old_set_stays(source, old, failing, call):
    before = bytes_of(old)
    said = run_ranks(3, fails_to_write, source, old, failing, call)
    assert all(text.startswith("SaveError: ") for text in said)
    assert all("No space left on device; what stood there is unchanged" in text for text in said)
    assert [f"rank {failing}: " in text for text in said] == [rank != failing for rank in range(3)]
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def fails_at_the_end(ranks: Any, source: Path, folder: Path) -> str:
    with mock.patch.object(saving, "_write_file", side_effect=OSError(28, "No space left on device")):
        return error_of(ranks, source, folder)


def test_rank_0_that_cannot_finish_is_every_ranks_error(source, old):
    before = bytes_of(old)
    said = run_ranks(2, fails_at_the_end, source, old)
    assert all("No space left on device; what stood there is unchanged" in text for text in said)
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def sees_no_folder(ranks: Any, source: Path, folder: Path) -> str:
    """Rank 1 is on a host that has its own file system."""
    if ranks.rank != 1:
        return error_of(ranks, source, folder)
    with mock.patch.object(Path, "exists", return_value=False):
        return error_of(ranks, source, folder)


def test_hosts_without_a_file_system_in_common_are_told_so(source, old):
    before = bytes_of(old)
    said = run_ranks(2, sees_no_folder, source, old)
    assert all("they share no file system" in text and "rank 1" in text for text in said)
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def saves_elsewhere(ranks: Any, source: Path, folder: Path) -> str:
    return error_of(ranks, source, folder / str(ranks.rank))


def test_another_folder_on_every_rank_is_refused(source, tmp_path):
    said = run_ranks(2, saves_elsewhere, source, tmp_path)
    assert all("rank 1: another folder" in text for text in said)
    assert os.listdir(tmp_path) == []


def misses_a_tensor(ranks: Any, folder: Path) -> str:
    plan = reversing.from_nothing([], targets(w=(3,), v=(3,)))
    tensors = {"w": torch.ones(3), "v": torch.ones(3)} if ranks.rank == 0 else {"w": torch.ones(3)}
    try:
        checkpoint.save(plan, tensors, folder, team=ranks)
    except MoebiusError as error:
        return str(error)
    return ""


def test_one_ranks_wrong_model_is_every_ranks_error(tmp_path):
    said = run_ranks(2, misses_a_tensor, tmp_path / "model")
    assert all("v: missing" in text for text in said)
    assert os.listdir(tmp_path) == []


def saves_but_for(ranks: Any, source: Path, folder: Path, away: int) -> str:
    """As in `if rank == 0: model.save_pretrained(...)`; who was away then learns what it has missed."""
    said = "" if ranks.rank == away else error_of(ranks, source, folder, patience=0.7)
    ranks.gathered(None, "going on")
    return said or error_of(ranks, source, folder)


@pytest.mark.parametrize("away", [0, 1])
def test_if_a_rank_stays_away_the_other_says_what_to_do(source, old, away):
    before = bytes_of(old)
    found = run_ranks(2, saves_but_for, source, old, away)
    assert f"rank {1 - away} of 2 came, and left" in found[away]
    said = found[1 - away]
    assert said.startswith(f"SaveError: {old} was not written: rank {1 - away}: ")
    assert f"rank {away} of 2 did not come within 0.7 s" in said
    assert "call save_pretrained on every rank" in said
    assert bytes_of(old) == before
    assert os.listdir(old.parent) == ["model"]


def dies(ranks: Any, source: Path, folder: Path, dying: int) -> str:
    if ranks.rank != dying:
        return error_of(ranks, source, folder)
    with mock.patch.object(saving, "fill_shards", side_effect=lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)):
        return error_of(ranks, source, folder)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_is_killed_while_it_writes_leaves_the_old_set_and_the_next_save_goes_well(source, old, dying):
    before = bytes_of(old)
    with pytest.raises(RuntimeError, match=f"rank {dying} ended"):
        run_ranks(2, dies, source, old, dying)
    assert bytes_of(old) == before
    plan = plan_of(source)
    checkpoint.save(plan, checkpoint.load(plan), old)
    assert {**bytes_of(source), "tokenizer.json": b"{}"} == bytes_of(old)
    assert os.listdir(old.parent) == ["model"]


# --- memory ---


def peak_growth(ranks: Any, folder: Path, experts: int, rows: int) -> int:
    """Bytes by which a save raises this process's peak, of a model that has to be cast and transposed."""
    rule = WeightConverter("packed", "experts.down", [Transpose(1, 2)])
    plan = reversing.from_nothing([rule], [Target("experts.down", (experts, rows, 1024), "bfloat16")])
    boxes = boxes_of({"experts.down": (experts,)}, ranks.rank, ranks.size)
    tensors = {"experts.down": torch.ones(len(boxes["experts.down"]), rows, 1024)}
    checkpoint.save(plan, tensors, folder / "first", team=ranks, boxes=boxes)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    checkpoint.save(plan, tensors, folder / "model", team=ranks, boxes=boxes)
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets a process's peak")
def test_a_save_needs_staging_buffers_and_no_more(tmp_path):
    growth = run_ranks(2, peak_growth, tmp_path, 6, 8192)  # 100 MB in files
    assert max(growth) < 12 << 20
