"""What a save writes: the same bytes by one thread or many, from any tensor and any device, laid out for pages."""

import hashlib
import subprocess
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from moebius import CheckpointError, Interleave, MergeModulelist, SaveError, WeightConverter, checkpoint
from moebius.checkpoint import checksums, fetching, mapping, reversing, saving, writing
from moebius.checkpoint.checksums import SUMS_FILE
from moebius.checkpoint.fetching import CpuLane, CudaLane
from moebius.checkpoint.planning import Target
from tests.checkpoint.folders import planned, read, targets, write
from tests.checkpoint.test_ways import EXPERTS, HIDDEN, RULES, SHAPES, WIDTH, mapped_bytes, plan_of, stored

WANTED = [Target(name, SHAPES[name], "bfloat16") for name in sorted(SHAPES, reverse=True)]  # small ones before large


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("bytes"), stored(), 3)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def use_threads(monkeypatch, threads: int) -> None:
    monkeypatch.setattr(saving, "default_readers", lambda: threads)


# --- threads, tensors, devices ---


@pytest.mark.parametrize("threads", [0, 1, 7])
@pytest.mark.parametrize("staging", [1000, 1 << 20])
def test_one_thread_or_many_small_pieces_or_large_write_the_same(source, tmp_path, monkeypatch, threads, staging):
    use_threads(monkeypatch, threads)
    monkeypatch.setattr(writing, "STAGING_BYTES", staging)
    monkeypatch.setattr(writing, "WRITE_BYTES", staging)
    plan = plan_of(source)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy", checksums=threads == 1)
    copy = bytes_of(tmp_path / "copy")
    assert (copy.pop(SUMS_FILE, None) is not None) == (threads == 1)
    assert copy == bytes_of(source)


def test_every_byte_of_a_file_is_written_once(source):
    plan = plan_of(source)
    tensors = checkpoint.load(plan)
    for shard in reversing.as_loaded(plan, dict.fromkeys(tensors, "bfloat16")).shards:
        jobs = sorted(writing.jobs_of(shard, tensors), key=lambda job: job.offset)
        ends = [len(shard.header), *(job.offset + job.nbytes for job in jobs)]
        assert [job.offset for job in jobs] == ends[:-1]
        assert ends[-1] == (source / shard.name).stat().st_size


@pytest.mark.parametrize("view", ["turned", "every other", "a part of a larger one"])
def test_a_tensor_that_is_a_view_is_written_without_a_copy_of_it(tmp_path, monkeypatch, view):
    rule = WeightConverter("experts.*.w", "packed", [MergeModulelist(0)])
    plan = reversing.from_nothing([rule], targets(packed=(4, 30, 50)))
    packed = {
        "turned": torch.randn(50, 30, 4).permute(2, 1, 0),
        "every other": torch.randn(4, 60, 50)[:, ::2],
        "a part of a larger one": torch.randn(9, 30, 50)[3:7],
    }[view]
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(writing, "STAGING_BYTES", 3000)
    checkpoint.save(plan, {"packed": packed}, tmp_path / "new")
    found = read(tmp_path / "new")
    assert all(torch.equal(found[f"experts.{e}.w"], packed[e]) for e in range(4))


class LateLane(CpuLane):
    """A device whose memory is not the host's: what it hands out is a copy in one slot, used again each time."""

    def __init__(self):
        super().__init__()
        self.slot = torch.full((fetching.WRITE_BYTES,), 0xFF, dtype=torch.uint8)
        self.largest = 0

    def host(self, found):
        self.slot.fill_(0xFF)
        self.slot[: found.nbytes] = found.reshape(-1).view(torch.uint8)
        self.largest = max(self.largest, found.nbytes)
        return super().host(self.slot[: found.nbytes])


@pytest.mark.parametrize("threads", [0, 5])
def test_tensors_of_a_device_come_through_slots(source, tmp_path, monkeypatch, threads):
    use_threads(monkeypatch, threads)
    lanes = []

    def lanes_to(devices):
        lanes.append(LateLane())
        return dict.fromkeys(devices, lanes[-1])

    monkeypatch.setattr(writing, "lanes_to", lanes_to)
    plan = plan_of(source)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == bytes_of(source)
    assert len(lanes) == max(1, threads)
    assert max(lane.largest for lane in lanes) > 100_000


def test_a_cuda_lane_copies_into_its_slot_on_its_stream_and_waits(monkeypatch):
    """The order of what is asked of CUDA, with stand-ins for its streams: nothing is read before it has arrived."""
    said = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            said.append("wait")

        def synchronize(self):
            said.append("synchronize")

        def __enter__(self):
            said.append("on stream")

        def __exit__(self, *error):
            said.append("off stream")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, **options: empty(*shape, dtype=dtype))
    lane = CudaLane(torch.device("cuda"))
    tensor = torch.randn(30, 7)
    assert bytes(lane.host(tensor)) == tensor.numpy().tobytes()
    assert said == ["wait", "on stream", "off stream", "synchronize"]
    scratch = lane.scratch()[:840].view(torch.float32)
    part = reversing.copied("w", (7, 30), "w").sources[0][0].layout.parts[0]
    lane.place(scratch, fetching.block_in(part, (7, 30), tensor.T), tensor.T)
    assert torch.equal(scratch.view(7, 30), tensor.T)


def test_a_model_on_the_meta_device_has_nothing_to_write(tmp_path):
    plan = reversing.from_nothing([], targets(w=(3,)))
    with pytest.raises(SaveError, match="w: no data: it is on the meta device"):
        checkpoint.save(plan, {"w": torch.empty(3, device="meta")}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- new files are laid out for pages ---


@pytest.fixture(scope="module")
def paged(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    model = {target.name: torch.randn(target.shape).bfloat16() for target in WANTED}
    folder = tmp_path_factory.mktemp("paged") / "model"
    checkpoint.save(reversing.from_nothing(RULES, WANTED), model, folder)
    return folder, model


def test_data_begin_on_a_page_in_the_order_of_the_parameters_and_small_tensors_come_last(paged):
    (shard,) = checkpoint.open_files(paged[0]).shards
    assert shard.data_start % 4096 == 0
    names = [info.name for info in sorted(shard.tensors, key=lambda info: info.offset)]
    pairs = [f"experts.{e}.{part}.weight" for e in range(EXPERTS) for part in ("gate", "up")]
    assert names[: 3 * EXPERTS] == [*pairs, *(f"experts.{e}.down.weight" for e in range(EXPERTS))]
    aligned = [info.nbytes % 4096 == 0 for info in sorted(shard.tensors, key=lambda info: info.offset)]
    assert aligned == sorted(aligned, reverse=True)
    assert 0 < sum(aligned) < len(aligned)


def test_a_packed_parameter_is_one_mapping(paged, monkeypatch):
    monkeypatch.setattr(mapping, "LEAST_PAGES", 2)
    folder, model = paged
    tensors = checkpoint.load(planned(folder, RULES, WANTED))
    assert all(torch.equal(tensors[name], model[name]) for name in model)
    assert tensors["experts.gate_up"].data_ptr() % 4096 == 0
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    whole = EXPERTS * 3 * WIDTH * HIDDEN * 2 + 1000 * HIDDEN * 2
    assert len(lines) == 3
    assert whole - 4096 <= mapped_bytes(folder) <= whole


def test_the_safetensors_library_reads_it(paged):
    folder, model = paged
    found = load_file(folder / "model.safetensors")
    assert torch.equal(found["experts.3.up.weight"], model["experts.gate_up"][3, WIDTH:])
    assert torch.equal(found["turned"], model["straight"].T)


# --- checksums ---


def saved(folder: Path, **options) -> Path:
    plan = reversing.from_nothing(RULES, WANTED, 300_000)
    checkpoint.save(plan, {target.name: torch.randn(target.shape).bfloat16() for target in WANTED}, folder, **options)
    return folder


def check(folder: Path) -> list[str]:
    return [str(fault) for fault in checksums.check(checkpoint.open_files(folder), threads=2)]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 16
    path.write_bytes(raw)


def test_checksums_are_what_sha256sum_verifies(tmp_path):
    folder = saved(tmp_path / "model", checksums=True)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert [line.split("  ")[1] for line in (folder / SUMS_FILE).read_text().splitlines()] == shards
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=folder, check=True)
    assert check(folder) == []


def test_a_flipped_bit_is_found_and_its_file_named(tmp_path):
    folder = saved(tmp_path / "model", checksums=True)
    name = sorted(path.name for path in folder.glob("*.safetensors"))[1]
    before = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    flip(folder / name)
    after = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert check(folder) == [f"{name}: damaged: sha256 {before} expected, found {after}"]


def test_a_shard_without_a_checksum_beside_others_is_found(tmp_path):
    folder = saved(tmp_path / "model", checksums=True)
    first, *rest = (folder / SUMS_FILE).read_text().splitlines(keepends=True)
    (folder / SUMS_FILE).write_text("".join(rest))
    assert check(folder) == [f"{first.split()[1]}: no checksum: SHA256SUMS has those of other shards"]


@pytest.mark.parametrize("content", [b"nonsense\n", b"\xff\n", b"12 model.safetensors\n"])
def test_checksums_that_cannot_be_read_are_a_fault(tmp_path, content):
    folder = saved(tmp_path / "model")
    (folder / SUMS_FILE).write_bytes(content)
    assert [fault.partition(": ")[0] for fault in check(folder)] == [SUMS_FILE]


def test_checksums_of_other_files_are_none_of_these(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / SUMS_FILE).write_text(f"{'0' * 64}  README.md\n{'0' * 64} *tokenizer.json\n")
    assert check(folder) == []


def test_a_save_without_checksums_leaves_none_of_the_old_ones(tmp_path):
    folder = saved(saved(tmp_path / "model", checksums=True))
    assert not (folder / SUMS_FILE).exists()
    assert check(folder) == []


def test_a_blob_of_the_hub_is_named_by_its_checksum(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in saved(tmp_path / "model").iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert check(snapshot) == []
    shard = min(snapshot.glob("*.safetensors"))
    flip(shard.resolve())
    assert [fault.split(": ")[:2] for fault in check(snapshot)] == [[shard.name, "damaged"]]


def test_a_file_that_changes_under_the_check_is_said_so(tmp_path):
    files = checkpoint.open_files(saved(tmp_path / "model", checksums=True))
    flip(files.shards[0].path)
    with pytest.raises(CheckpointError, match=f"{files.shards[0].path.name} changed"):
        checksums.check(files, threads=2)


# --- memory ---


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.parametrize("operations", [[], [Interleave(1)]], ids=["runs", "slabs"])
def test_a_save_needs_little_memory_beside_the_model(tmp_path, operations):
    """Half a gigabyte in four shards, by eight threads; the bound is a quarter of the goal of 256 MB."""
    rule = WeightConverter("experts.*.w", "packed", [MergeModulelist(0), *operations])
    wanted = [Target("packed", (64, 2048, 2048), "bfloat16")]
    model = {"packed": torch.ones(64, 2048, 2048, dtype=torch.bfloat16)}
    plan = reversing.from_nothing([rule], wanted, 150 << 20)
    assert len(plan.shards) == 4
    over, most, before = threading.Event(), [0], anonymous_bytes()

    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with mock.patch.object(saving, "default_readers", return_value=8):
        checkpoint.save(plan, model, tmp_path / "new", checksums=True)
    over.set()
    watcher.join()
    print(f"{(most[0] - before) / 2**20:.1f} MiB")
    assert 0 < most[0] - before < 64 << 20
