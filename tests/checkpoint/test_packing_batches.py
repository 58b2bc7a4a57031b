"""Quantized in windows, as on a GPU, through a feed to the host: the bits of the whole weight quantized, and no thread
left waiting whoever fails.
"""

import json
import threading
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moebius import AutoModelForCausalLM, Interleave, Transpose, WeightConverter, WeightSkip
from moebius.checkpoint import load, packing_batches, reading
from moebius.checkpoint.device import Slot, Slots
from moebius.checkpoint.packing_batches import ARITHMETIC_BYTES, WINDOWS, read_batched
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.quantizing import Packing, quantized
from moebius.checkpoint.reading import Shards, raw_bytes, torch_dtype
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.checkpoint.folders import planned, write
from tests.checkpoint.test_packing import (
    EXPERTS,
    HIDDEN,
    NAME,
    PACK,
    WIDTH,
    assert_quantized,
    every_form,
    keys,
    packing,
    per_expert,
    same_bits,
    weight,
)
from tests.families import tiny_config
from tests.quantized_folders import int4_pack

MATRIX = WIDTH * HIDDEN * 2  # bytes of one expert's gate or up in bfloat16


class Copies:
    """A stream, and the event that all on it has come to pass: nothing on it does until somebody waits."""

    def __init__(self, *todo):
        self.todo, self.waited, self.lock = list(todo), False, threading.Lock()

    def record_event(self):
        return self

    def query(self):
        return self.waited

    def synchronize(self):
        with self.lock:
            while self.todo:
                self.todo.pop(0)()
            self.waited = True


class HostLane:
    """A Lane to the host; what was in a slot from which the copies are done is gone."""

    def __init__(self, feed: "HostFeed"):
        self.feed, self.todo, self.after = feed, [], None

    def slot(self):
        self.held = self.feed.slots.take()
        return self.held

    def wait(self, event):
        self.after = event

    def copy(self, target, start, begin, nbytes):
        source = self.held.tensor[begin : begin + nbytes]
        self.todo.append(lambda: target[start : start + nbytes].copy_(source))
        self.feed.copies.append((target.data_ptr(), self.after))

    def sent(self):
        sent = Copies(*self.todo, partial(self.held.tensor.fill_, 255))
        self.todo = []
        self.feed.slots.give(self.held, sent)
        return sent


class HostFeed:
    """A Feed to the host, whose copies are done no sooner than somebody waits for them.

    copies: the address of the buffer that each goes to, and the event that the lane waited for before.
    """

    device = torch.device("cpu")

    def __init__(self, slot_bytes: int = 1 << 20, count: int = 4):
        self.slot_bytes, self.slots, self.copies = slot_bytes, Slots(), []
        for _ in range(count):
            tensor = torch.empty(slot_bytes, dtype=torch.uint8)
            self.slots.give(Slot(tensor, raw_bytes(tensor)))

    def lane(self):
        return HostLane(self)

    def wait(self, events):
        for event in events:
            event.synchronize()

    def mark(self):
        return Copies()


def batched(plan: Plan, feed: HostFeed, threads: int = 4, **options):
    """What the plan's packs fill, and the faults."""
    targets = [plan.targets[name] for pack in plan.packs for name in (pack.name, pack.scale_name)]
    tensors = {target.name: torch.empty(target.shape, dtype=torch_dtype(target.dtype)) for target in targets}
    with Shards(plan.files.shards) as shards:
        return tensors, read_batched(plan.packs, tensors, shards, feed, threads=threads, **options)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moebius-reader")]


def windows_of(monkeypatch, window_bytes: int, matrices: int = 100) -> None:
    """Windows of so many bytes, of which so many matrices are quantized at once, in int4."""
    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", window_bytes)
    elements = matrices * WIDTH * HIDDEN
    monkeypatch.setattr(packing_batches, "QUANTIZING_BYTES", elements * (ARITHMETIC_BYTES["int4_pack"] + 2))


@pytest.fixture
def small_windows(monkeypatch):
    """One expert each, its gate and its up."""
    windows_of(monkeypatch, 2 * MATRIX)


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Of all that is quantized in windows."""
    seen = []
    spied = lambda form, rows: seen.append(tuple(rows.shape)) or quantize(form, rows)  # noqa: E731
    monkeypatch.setattr(packing_batches, "quantize", spied)
    return seen


# --- the bits ----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_windows_give_what_the_whole_weight_would(tmp_path, form, dtype, threads):
    whole = weight(dtype)
    plan = packing(write(tmp_path, per_expert(whole), shards=3), PACK, form)
    tensors, faults = batched(plan, HostFeed(), threads)
    assert_quantized(tensors, form, whole)
    assert not faults


@every_form
@pytest.mark.parametrize("slot_bytes", [1000, 1 << 20])
@pytest.mark.parametrize("window_bytes", [1, MATRIX, 2 * MATRIX + 50, 1_000_000])
@pytest.mark.parametrize("matrices", [0, 1, 2, 100])
def test_however_small_slots_and_windows_are(tmp_path, monkeypatch, form, slot_bytes, window_bytes, matrices):
    windows_of(monkeypatch, window_bytes, matrices)
    whole = weight()
    plan = packing(write(tmp_path, per_expert(whole)), PACK, form)
    assert_quantized(batched(plan, HostFeed(slot_bytes))[0], form, whole)


@every_form
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("window_bytes", [MATRIX, 2 * MATRIX, 1_000_000])
def test_transposed_and_alternating_rows_are_seen_through(tmp_path, monkeypatch, form, transposed, window_bytes):
    windows_of(monkeypatch, window_bytes)
    whole = weight()
    stored = torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2)
    operations = [Interleave(dim=1, undo=True)]
    if transposed:
        stored, operations = stored.transpose(1, 2).contiguous(), [Transpose(1, 2), *operations]
    plan = packing(write(tmp_path, {NAME: stored}), [WeightConverter(NAME, NAME, operations)], form)
    assert_quantized(batched(plan, HostFeed())[0], form, whole)


def test_what_two_halves_of_a_matrix_share_is_read_once(tmp_path, monkeypatch, small_windows):
    stored = torch.stack(weight().chunk(2, dim=1), dim=2).flatten(1, 2).transpose(1, 2).contiguous()
    rules = [WeightConverter(NAME, NAME, [Transpose(1, 2), Interleave(dim=1, undo=True)])]
    plan, feed = packing(write(tmp_path, {NAME: stored}), rules, PackedInt4()), HostFeed()
    batched(plan, feed)
    assert len(feed.copies) == EXPERTS


def write_as_it_comes(folder, tensors: dict[str, torch.Tensor]):
    """A file of the tensors in this order, at any byte; the safetensors library would sort them."""
    header, data, dtypes = {}, b"", {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        data += bytes(raw_bytes(tensor))
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("between", [0, 1], ids=["side by side", "a byte apart"])
def test_experts_in_any_order_at_any_byte_come_to_their_places(tmp_path, order, between):
    whole = weight(torch.float32)
    stored = sorted(per_expert(whole).items(), key=lambda item: order.index(int(item[0].split(".")[1])))
    odd = [(f"odd.{at}", torch.zeros(between, dtype=torch.uint8)) for at in range(len(stored))]
    folder = write_as_it_comes(tmp_path, dict(item for pair in zip(odd, stored, strict=True) for item in pair))
    plan = packing(folder, [*PACK, WeightSkip("odd.*", "it is not a weight")], PackedInt4())
    assert_quantized(batched(plan, HostFeed())[0], PackedInt4(), whole)


def test_float32_right_after_an_odd_number_of_bfloat16_is_aligned(tmp_path):
    stored = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(3, 5)}
    plain = planned(write_as_it_comes(tmp_path, stored), [], [Target(name, (3, 5), "float32") for name in stored])
    found = batched(quantized(plain, dict.fromkeys(stored, Packing(Int8()))), HostFeed())[0]
    for name, matrix in stored.items():
        assert all(map(same_bits, (found[name], found[f"{name}_scale"]), quantize(Int8(), matrix)))


@every_form
def test_a_weight_under_its_own_name_is_cut_at_the_border_of_gate_and_up(tmp_path, form):
    whole = weight()
    assert_quantized(batched(packing(write(tmp_path, {NAME: whole}), [], form), HostFeed())[0], form, whole)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_every_weight_of_a_model_is_what_the_host_makes_of_it(tmp_path, family, form):
    config = tiny_config(family, hidden_size=256, torch_dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form).plan
    on_host, (found, _) = load(plan), batched(plan, HostFeed())
    assert found
    for name, tensor in found.items():
        assert same_bits(tensor, on_host[name]), name


def test_what_lies_in_another_form_is_quantized_too(tmp_path):
    stored = {key: int4_pack(matrix) for key, matrix in per_expert(weight(torch.float32)).items()}
    plan = packing(write(tmp_path, keys(stored)), PACK, Int8(), PackedInt4())
    found, on_host = batched(plan, HostFeed())[0], load(plan)
    assert all(same_bits(tensor, on_host[name]) for name, tensor in found.items())


# --- windows -----------------------------------------------------------------------------------------------------


def test_neighbours_are_read_in_one_go_and_those_that_are_alike_quantized_at_once(tmp_path, shapes):
    plan, feed = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), HostFeed()
    batched(plan, feed)
    assert len(feed.copies) == 1
    assert shapes == [(EXPERTS, WIDTH, HIDDEN)] * 2


@pytest.mark.parametrize("matrices", [1, 2])
def test_no_more_are_quantized_at_once_than_there_is_memory_for(tmp_path, monkeypatch, shapes, matrices):
    windows_of(monkeypatch, 1_000_000, matrices)
    batched(packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), HostFeed())
    assert [n for n, *_ in shapes] == {1: [1] * 6, 2: [2, 1] * 2}[matrices]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_buffer_is_filled_again_once_what_was_quantized_from_it_is_done(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", MATRIX)
    plan, feed = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), HostFeed()
    batched(plan, feed, threads)
    buffers, awaited = zip(*feed.copies, strict=True)
    assert len(set(buffers)) == WINDOWS < len(buffers)
    assert len(set(awaited)) == len(awaited)


class Held(TorchDispatchMode):
    """The most bytes that the results of torch's operations held at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(found)):
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, storage):
        self.now -= self.storages.pop(storage)


@pytest.mark.parametrize(
    "sizes", [{"moe_intermediate_size": 256}, {"intermediate_size": 256}], ids=["qwen3", "gpt_oss"]
)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_beside_the_quantized_model_no_more_is_held_than_is_reckoned_with(tmp_path, monkeypatch, sizes, form):
    family = "qwen3_moe" if "moe_intermediate_size" in sizes else "gpt_oss"
    window, quantizing, slot = 1 << 20, 4 << 20, 1 << 16
    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", window)
    monkeypatch.setattr(packing_batches, "QUANTIZING_BYTES", quantizing)
    config = tiny_config(family, hidden_size=512, torch_dtype="bfloat16", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan, feed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form).plan, HostFeed(slot, 1)
    with Held() as held:
        batched(plan, feed, 0, look_for_nan=True)
    assert 0 < held.peak - WINDOWS * window - plan.target_bytes - slot <= quantizing


@pytest.mark.parametrize("form", [Int8(), PackedInt4(), BlockFp8(), Mxfp4()], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_arithmetic_of_a_form_takes_no_more_memory_than_is_reckoned_with(form, dtype):
    rows = torch.randn(2, 256, 512).to(dtype)
    with Held() as held:
        quantize(form, rows)
    reckoned = ARITHMETIC_BYTES[form.name] * rows.numel()
    assert 0.8 * reckoned < held.peak <= reckoned


# --- faults ------------------------------------------------------------------------------------------------------


def test_nan_is_found_if_it_is_looked_for(tmp_path, small_windows):
    whole = weight()
    whole[1, 50, 3] = whole[2, 0, 0] = torch.nan
    plan = packing(write(tmp_path, per_expert(whole)), PACK, PackedInt4())
    faults = batched(plan, HostFeed(), look_for_nan=True)[1]
    assert [fault.where for fault in faults] == ["experts.1.up_proj.weight", "experts.2.gate_proj.weight"]
    assert not batched(plan, HostFeed())[1]


@pytest.mark.parametrize("threads", [0, 4])
def test_every_stored_byte_is_told_of_once(tmp_path, threads):
    plan, told = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), []
    batched(plan, HostFeed(), threads, advance=told.append)
    assert sum(told) == plan.bytes_to_read


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_readers_error_is_raised_once_all_have_stopped(tmp_path, monkeypatch, small_windows, threads, number):
    def torn(descriptor, place, offset, file):
        if offset == plan.packs[number].info.offset:
            raise OSError("torn")
        reading.read_into(descriptor, place, offset, file)

    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", MATRIX)
    monkeypatch.setattr(packing_batches, "read_into", torn)
    plan = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4())
    with pytest.raises(OSError, match="torn"):
        batched(plan, HostFeed(count=max(1, threads)), threads)
    assert not readers()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("name", ["quantize", "places"])
def test_nobody_waits_for_a_buffer_for_ever_when_the_quantizing_thread_fails(
    tmp_path, monkeypatch, error, threads, name
):
    def fail(*_):
        raise error("in vain")

    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", MATRIX)
    monkeypatch.setattr(packing_batches, name, fail)
    plan = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4())
    with pytest.raises(error, match="in vain"):
        batched(plan, HostFeed(), threads)
    assert not readers()


@pytest.mark.parametrize("name", ["lane", "slot", "copy", "sent"])
@pytest.mark.parametrize("threads", [0, 4])
def test_a_device_that_refuses_is_an_error_and_nobody_waits(tmp_path, monkeypatch, name, threads):
    def refuse(*_):
        raise RuntimeError("refused")

    monkeypatch.setattr(packing_batches, "WINDOW_BYTES", MATRIX)
    monkeypatch.setattr(HostFeed if name == "lane" else HostLane, name, refuse)
    with pytest.raises(RuntimeError, match="refused"):
        batched(packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), HostFeed(), threads)
    assert not readers()
