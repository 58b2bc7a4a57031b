"""Loading: everything lands in its place, whatever way it has to take, and what changed meanwhile is noticed."""

import os

import pytest
import torch

from moebius import CapacityError, CheckpointError, Interleave, MergeModulelist, Transpose, WeightConverter, checkpoint
from moebius.checkpoint import loading, reading, staging
from moebius.checkpoint.loading import check_room
from moebius.checkpoint.reading import Shards
from tests.checkpoint.folders import numbered, planned, targets, write

STACK = WeightConverter("experts.*.w", "packed", [MergeModulelist(0)])


class Recorder:
    """A Progress that writes down what it is told."""

    def __init__(self):
        self.total, self.done, self.finished = -1, 0, False

    def start(self, total_bytes, label):
        self.total = total_bytes

    def advance(self, nbytes):
        self.done += nbytes

    def finish(self):
        self.finished = True


def test_progress_counts_every_byte_once(tmp_path):
    folder = write(tmp_path, {"a": numbered(5, 7), "b": numbered(3)}, shards=2)
    shown = Recorder()
    checkpoint.load(planned(folder, [], targets(a=(5, 7), b=(3,))), progress=shown)
    assert shown.total == shown.done == 38 * 4
    assert shown.finished


def test_progress_counts_rearranged_bytes_once_too(tmp_path):
    folder, shown = write(tmp_path, {"stored": numbered(8, 5)}), Recorder()
    rule = WeightConverter("stored", "w", [Interleave(0, undo=True)])
    checkpoint.load(planned(folder, [rule], targets(w=(8, 5))), progress=shown)
    assert shown.total == shown.done == 40 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_casts_equal_torchs_own(tmp_path, dtype):
    values = torch.randn(40, 30).to(dtype)
    loaded = checkpoint.load(planned(write(tmp_path, {"w": values}), [], targets(w=(40, 30))))
    assert torch.equal(loaded["w"], values.float())


@pytest.mark.parametrize("limit", [4, 64, 100, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("operations", "shape", "result"),
    [
        ([Transpose(0, 2)], (6, 5, 4), lambda w: w.transpose(0, 2)),
        ([Transpose(1, 2)], (6, 5, 4), lambda w: w.transpose(1, 2)),
        ([Interleave(2)], (3, 5, 8), lambda w: w.unflatten(2, (2, 4)).transpose(2, 3).flatten(2)),
        ([Interleave(0, undo=True)], (8, 15), lambda w: w.unflatten(0, (4, 2)).transpose(0, 1).flatten(0, 1)),
        ([Transpose(0, 1), Interleave(0)], (5, 8), lambda w: w.T.unflatten(0, (2, 4)).transpose(0, 1).flatten(0, 1)),
    ],
)
def test_what_cannot_be_read_into_place_is_staged_in_any_block_size(
    tmp_path, monkeypatch, operations, shape, result, limit
):
    monkeypatch.setattr(staging, "BUFFER_BYTES", limit)
    values = numbered(*shape)
    wanted = result(values)
    rule = WeightConverter("stored", "w", operations)
    loaded = checkpoint.load(planned(write(tmp_path, {"stored": values}), [rule], targets(w=tuple(wanted.shape))))
    assert torch.equal(loaded["w"], wanted)


def test_a_tensor_larger_than_the_staging_is_cast_in_pieces(tmp_path):
    values = torch.randn(3, 700_001).to(torch.bfloat16)
    loaded = checkpoint.load(planned(write(tmp_path, {"w": values}), [], targets(w=(3, 700_001))))
    assert torch.equal(loaded["w"], values.float())


def test_a_file_that_changed_after_the_plan_is_refused(tmp_path):
    folder = write(tmp_path, {"w": numbered(4)})
    plan = planned(folder, [], targets(w=(4,)))
    write(folder, {"w": numbered(4, start=9)})
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was loaded"):
        checkpoint.load(plan)


def test_a_file_that_ends_early_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path, {"w": numbered(4)})
    plan = planned(folder, [], targets(w=(4,)))
    monkeypatch.setattr(reading.os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="it ends at byte"):
        checkpoint.load(plan)


def test_a_read_in_small_pieces_is_completed(tmp_path, monkeypatch):
    folder = write(tmp_path, {"w": numbered(100)})
    plan = planned(folder, [], targets(w=(100,)))
    whole = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    assert torch.equal(checkpoint.load(plan)["w"], numbered(100))


def test_nan_is_found_only_when_asked_for(tmp_path):
    tensors = {f"experts.{e}.w": numbered(2, 3) for e in range(3)}
    tensors["experts.1.w"][1, 2] = float("nan")
    plan = planned(write(tmp_path, tensors), [STACK], targets(packed=(3, 2, 3)))
    assert checkpoint.load(plan)["packed"].isnan().sum() == 1
    with pytest.raises(CheckpointError, match=r"experts\.1\.w: NaN: in model\.safetensors"):
        checkpoint.load(plan, check_tensors=True)


def test_what_does_not_fit_is_said_before_a_weight_is_read(tmp_path, monkeypatch):
    plan = planned(write(tmp_path, {"w": numbered(4)}), [], targets(w=(4,)))
    check_room(plan, torch.device("cpu"))
    monkeypatch.setattr(loading, "_free_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match="needs 1,048,592 bytes on cpu, 1,000 are free; no weight was read"):
        check_room(plan, torch.device("cpu"))


def test_a_file_that_is_cut_while_it_is_read_is_noticed(tmp_path):
    write(tmp_path, {"w": torch.ones(3000)})
    with Shards(checkpoint.open_files(tmp_path).shards) as shards:
        shards.descriptor("model.safetensors")
        shards.check()
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="it is another file than when its header was read"):
            shards.check()
