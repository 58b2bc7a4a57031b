"""However a plan is run, mapped or copied, by one thread or many, through a device's lanes, the bits are the same."""

import os
import random
import threading
from pathlib import Path

import pytest
import torch

from moebius import CheckpointError, Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter, checkpoint
from moebius.checkpoint import device, mapping, pool
from moebius.checkpoint.device import send
from moebius.checkpoint.extents import extents, offset_of
from moebius.checkpoint.jobs import Run, Staged, jobs
from moebius.checkpoint.loading import LoadOptions
from moebius.checkpoint.planning import Target
from moebius.checkpoint.reading import Shards, raw_bytes
from tests.checkpoint.folders import planned, write

EXPERTS, WIDTH, HIDDEN = 6, 96, 128  # 24 KiB a bfloat16 matrix: 6 pages; gate and up of one expert 12
RULES = [
    WeightConverter(
        ["experts.*.gate.weight", "experts.*.up.weight"], "experts.gate_up", [MergeModulelist(0), Concatenate(1)]
    ),
    WeightConverter("experts.*.down.weight", "experts.down", [MergeModulelist(0)]),
    WeightConverter("turned", "straight", [Transpose(0, 1)]),
    WeightConverter("rows", "halves", [Interleave(0, undo=True)]),
]
SHAPES = {
    "experts.gate_up": (EXPERTS, 2 * WIDTH, HIDDEN),
    "experts.down": (EXPERTS, HIDDEN, WIDTH),
    "straight": (300, 200),
    "halves": (64, 777),
    "norm": (HIDDEN,),
    "embed": (1000, HIDDEN),
}


def stored() -> dict[str, torch.Tensor]:
    tensors = {
        f"experts.{e}.{part}.weight": torch.randn((HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN))
        for e in range(EXPERTS)
        for part in ("gate", "up", "down")
    }
    tensors |= {"turned": torch.randn(200, 300), "rows": torch.randn(64, 777)}
    tensors |= {"norm": torch.randn(HIDDEN), "embed": torch.randn(1000, HIDDEN)}
    return {key: tensor.bfloat16() for key, tensor in tensors.items()}


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = range(EXPERTS)
    pairs = [torch.cat([tensors[f"experts.{e}.{part}.weight"] for part in ("gate", "up")]) for e in ids]
    return {
        "experts.gate_up": torch.stack(pairs),
        "experts.down": torch.stack([tensors[f"experts.{e}.down.weight"] for e in ids]),
        "straight": tensors["turned"].T,
        "halves": torch.cat([tensors["rows"][0::2], tensors["rows"][1::2]]),
        "norm": tensors["norm"],
        "embed": tensors["embed"],
    }


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "three files"])
def folder(request, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = stored()
    return write(tmp_path_factory.mktemp("ways"), tensors, request.param), expected(tensors)


def plan_of(folder: Path, dtype: str = "bfloat16"):
    return planned(folder, RULES, [Target(name, shape, dtype) for name, shape in SHAPES.items()])


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        LoadOptions("sync", "never"),
        LoadOptions("sync", "auto"),
        LoadOptions("async", "never", 1),
        LoadOptions("async", "never", 7),
        LoadOptions("async", "auto", 7),
    ],
    ids=str,
)
def test_every_way_gives_the_same_bits(folder, options, dtype, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    path, wanted = folder
    assert_equal(checkpoint.load(plan_of(path, dtype), options=options), wanted, getattr(torch, dtype))


def mapped_bytes(path: Path) -> int:
    """How many bytes of the folder's files are mapped into this process, by the kernel's own list."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [[int(end, 16) for end in fields[0].split("-")] for fields in lines]
    return sum(end - begin for begin, end in spans)


def test_pages_are_mapped_as_long_as_a_tensor_lives_and_unmapped_with_the_last(folder, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    path, wanted = folder
    tensors = checkpoint.load(plan_of(path))
    assert mapped_bytes(path) > 0.6 * sum(wanted[name].nbytes for name in ("experts.gate_up", "experts.down", "embed"))
    kept = tensors["embed"][5:]
    del tensors
    assert 0 < mapped_bytes(path) <= wanted["embed"].nbytes
    assert torch.equal(kept, wanted["embed"][5:])
    del kept
    assert mapped_bytes(path) == 0


def test_what_is_mapped_can_be_written_and_leaves_the_file_alone(folder, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    path, _ = folder
    before = {file: file.read_bytes() for file in path.iterdir()}
    tensors = checkpoint.load(plan_of(path))
    for tensor in tensors.values():
        tensor.fill_(7)
    assert all(bool((tensor == 7).all()) for tensor in tensors.values())
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_nothing_is_mapped_if_asked_not_to_or_from_a_remote_file_system(folder, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    path, _ = folder
    tensors = checkpoint.load(plan_of(path), options=LoadOptions(mapping="never"))
    assert mapped_bytes(path) == 0
    monkeypatch.setattr(mapping, "LOCAL", set())
    tensors = checkpoint.load(plan_of(path))
    assert mapped_bytes(path) == 0
    del tensors


def test_when_mappings_run_out_the_rest_is_copied(folder, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    monkeypatch.setattr(mapping, "MAX_MAPPINGS", 3)
    path, wanted = folder
    tensors = checkpoint.load(plan_of(path))
    assert 0 < mapped_bytes(path) < 200_000
    assert_equal(tensors, wanted, torch.bfloat16)


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_every_job_is_done_once_and_the_first_error_stops_the_rest(threads):
    done: list[int] = []
    pool.run_all(range(100), done.append, threads)
    assert sorted(done) == list(range(100))

    def fails(job: int) -> None:
        if job == 3:
            raise KeyError(job)
        done.append(job)

    done.clear()
    with pytest.raises(KeyError):
        pool.run_all(range(10_000), fails, threads)
    assert len(done) < 10_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moebius-reader")]


def test_an_interrupt_stops_the_readers(monkeypatch):
    started = threading.Event()

    def interrupted(self, timeout=None):
        monkeypatch.undo()
        assert started.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run_all(iter(int, 1), lambda _: started.set(), 2)  # endless
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moebius-reader")]


def test_a_reader_that_fails_names_the_file(folder, monkeypatch):
    path, _ = folder
    plan = plan_of(path)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"model.*safetensors changed while it was loaded"):
        checkpoint.load(plan, options=LoadOptions("async", "never", 4))


# --- lanes to a device -----------------------------------------------------------------------------------------------


class LateLane:
    """A device whose copies are done late, lanes in any order: when a slot is asked for again, or at the end."""

    def __init__(self, slots: int):
        tensors = [torch.full((device.SLOT_BYTES,), 0xFF, dtype=torch.uint8) for _ in range(slots)]
        self._slots = [device.Slot(tensor, raw_bytes(tensor)) for tensor in tensors]
        self._turn, self._todo = -1, []

    def slot(self):
        self._turn += 1
        if self._turn >= len(self._slots):
            self.finish()
        return self._slots[self._turn % len(self._slots)]

    def copy(self, target, start, begin, nbytes):
        source = self._slots[self._turn % len(self._slots)].tensor[begin : begin + nbytes]
        place = target.view(-1).view(torch.uint8)[start : start + nbytes]
        self._todo.append(lambda: place.copy_(source))

    def place(self, target, source, strides):
        found = source.as_strided(target.shape, strides, source.storage_offset())
        self._todo.append(lambda: target.copy_(found))

    def sent(self):
        pass

    def finish(self):
        for copy in self._todo:
            copy()
        self._todo.clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("slot_bytes", [1 << 12, 50_000, 8 << 20])
def test_lanes_that_copy_late_and_out_of_order_fill_every_tensor(folder, monkeypatch, slot_bytes, dtype):
    monkeypatch.setattr(device, "SLOT_BYTES", slot_bytes)
    path, wanted = folder
    plan = plan_of(path, dtype)
    tensors = {name: torch.full(shape, float("nan"), dtype=getattr(torch, dtype)) for name, shape in SHAPES.items()}
    lanes = [LateLane(slots) for slots in (1, 2, 2, 3)]
    choose = random.Random(5)
    with Shards(plan.files.shards) as shards:
        for extent in extents(jobs(plan), slot_bytes):
            send(extent, choose.choice(lanes), tensors, shards)
        for lane in choose.sample(lanes, len(lanes)):
            lane.finish()
    assert_equal(tensors, wanted, getattr(torch, dtype))


def test_extents_read_each_byte_of_the_files_about_once(folder):
    path, wanted = folder
    plan = plan_of(path)
    found = list(extents(jobs(plan), 50_000))
    assert all(extent.nbytes <= 50_000 for extent in found)
    total = sum(tensor.nbytes for tensor in wanted.values())
    assert total <= sum(extent.nbytes for extent in found) < 1.05 * total
    for extent in found:
        assert all(extent.offset <= offset_of(job) for job in extent.jobs)
        assert all(offset_of(job) + job.nbytes <= extent.offset + extent.nbytes for job in extent.jobs)


def test_neighbours_are_read_together_and_what_turns_is_staged(folder):
    path, _ = folder
    todo = list(jobs(plan_of(path)))
    staged = [job.target for job in todo if isinstance(job, Staged)]
    assert sorted(set(staged)) == ["halves", "straight"]
    gates = [job for job in todo if isinstance(job, Run) and job.target == "experts.gate_up"]
    assert len(gates) <= 2 * EXPERTS
