"""Quantized in batches, as on a GPU, through a feed to the host: the bits of the whole weight quantized, and no thread
left waiting whoever fails.
"""

import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moebius import AutoModelForCausalLM, Interleave, Transpose, WeightConverter
from moebius.checkpoint import device, load, packing_batches
from moebius.checkpoint.device import SLOTS, CudaLane, PinnedSlots, Slot, Slots
from moebius.checkpoint.packing_batches import ARITHMETIC_BYTES, read_batched
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.quantizing import Packing, quantized
from moebius.checkpoint.reading import Shards, raw_bytes, torch_dtype
from moebius.errors import CapacityError
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

MATRIX = WIDTH * HIDDEN  # elements of one expert's gate or up


class HostFeed:
    """A Feed to the host; what was in a slot that is given back is gone."""

    def __init__(self, slot_bytes: int = 1 << 20, count: int = 3):
        self.slot_bytes, self.slots = slot_bytes, Slots()
        self.take = self.slots.take
        for _ in range(count):
            tensor = torch.empty(slot_bytes, dtype=torch.uint8)
            self.slots.give(Slot(tensor, raw_bytes(tensor)))

    def copy(self, target, start, slot, nbytes):
        target.view(-1).view(torch.uint8)[start : start + nbytes] = slot.tensor[:nbytes]

    def give(self, slot):
        slot.tensor.fill_(255)
        self.slots.give(slot)


def batched(plan: Plan, feed: HostFeed, threads: int = 4, read_into=None, **options):
    """What the plan's packs fill, and the faults."""
    targets = [plan.targets[name] for pack in plan.packs for name in (pack.name, pack.scale_name)]
    tensors = {target.name: torch.empty(target.shape, dtype=torch_dtype(target.dtype)) for target in targets}
    with Shards(plan.files.shards) as shards:
        read_into = read_into or shards.read_into
        return tensors, read_batched(plan.packs, tensors, read_into, feed, threads=threads, **options)


def none_reads_any_more() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("moebius-reader")]


@pytest.fixture
def small_batches(monkeypatch):
    """Four bfloat16 matrices a batch, where the form is int4."""
    monkeypatch.setattr(packing_batches, "PACKING_BYTES", 4 * MATRIX * (ARITHMETIC_BYTES["int4_pack"] + 3 * 2))


# --- the bits ----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_batches_give_what_the_whole_weight_would(tmp_path, form, dtype, threads):
    whole = weight(dtype)
    plan = packing(write(tmp_path, per_expert(whole), shards=3), PACK, form)
    tensors, faults = batched(plan, HostFeed(), threads)
    assert_quantized(tensors, form, whole)
    assert not faults


@every_form
@pytest.mark.parametrize("slot_bytes", [1, 30 * HIDDEN * 2, 1 << 20])
@pytest.mark.parametrize("packing_bytes", [1, 50_000, 1_000_000])
def test_however_small_slots_and_batches_are(tmp_path, monkeypatch, form, slot_bytes, packing_bytes):
    monkeypatch.setattr(packing_batches, "PACKING_BYTES", packing_bytes)
    whole = weight()
    plan = packing(write(tmp_path, per_expert(whole)), PACK, form)
    assert_quantized(batched(plan, HostFeed(slot_bytes))[0], form, whole)


@every_form
@pytest.mark.parametrize("slot_bytes", [30 * HIDDEN * 2, 1 << 20])
def test_transposed_rows_that_alternate_are_put_in_order_first(tmp_path, form, slot_bytes):
    whole = weight()
    alternating = torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2)
    rules = [WeightConverter(NAME, NAME, [Transpose(1, 2), Interleave(dim=1, undo=True)])]
    plan = packing(write(tmp_path, {NAME: alternating.transpose(1, 2).contiguous()}), rules, form)
    assert_quantized(batched(plan, HostFeed(slot_bytes))[0], form, whole)


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


# --- batches -----------------------------------------------------------------------------------------------------


def test_slabs_that_are_alike_are_quantized_together_and_the_last_by_what_is_left(tmp_path, monkeypatch, small_batches):
    seen = []
    monkeypatch.setattr(packing_batches, "quantize", lambda form, rows: seen.append(rows.shape) or quantize(form, rows))
    plan = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4())
    batched(plan, HostFeed())
    assert seen == [(4, WIDTH, HIDDEN), (2 * EXPERTS - 4, WIDTH, HIDDEN)]


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


def test_of_batches_that_are_not_full_few_are_held(tmp_path, monkeypatch):
    heights, form = range(8, 129, 8), PackedInt4()
    room = heights[-1] * HIDDEN * (ARITHMETIC_BYTES[form.name] + packing_batches.OPEN_BATCHES * 2)
    monkeypatch.setattr(packing_batches, "PACKING_BYTES", room)
    stored = {f"w{height}": torch.randn(height, HIDDEN).bfloat16() for height in heights}
    plain = planned(write(tmp_path, stored), [], [Target(key, (*w.shape,), "bfloat16") for key, w in stored.items()])
    plan = quantized(plain, dict.fromkeys(stored, Packing(form)))
    with Held() as held:
        batched(plan, HostFeed(), 0)
    slots = 3 << 20
    assert held.peak <= room + plan.target_bytes + slots


@pytest.mark.parametrize("form", [Int8(), PackedInt4(), BlockFp8(), Mxfp4()], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_arithmetic_of_a_form_takes_no_more_memory_than_is_reckoned_with(form, dtype):
    rows = torch.randn(2, 256, 512).to(dtype)
    with Held() as held:
        quantize(form, rows)
    reckoned = ARITHMETIC_BYTES[form.name] * rows.numel()
    assert 0.8 * reckoned < held.peak <= reckoned


# --- faults ------------------------------------------------------------------------------------------------------


def test_nan_is_found_if_it_is_looked_for(tmp_path, small_batches):
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
@pytest.mark.parametrize("slots", [1, 3])
def test_a_readers_error_is_raised_and_all_slots_come_back(tmp_path, threads, slots):
    def torn(info, memory, start):
        if info.name == "experts.1.gate_proj.weight":
            raise OSError("torn")

    plan, feed = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), HostFeed(count=slots)
    with pytest.raises(OSError, match="torn"):
        batched(plan, feed, threads, read_into=torn)
    assert none_reads_any_more()
    assert feed.slots._free.qsize() == slots


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("name", ["quantize", "places"])
def test_nobody_waits_for_a_slot_for_ever_when_the_quantizing_thread_fails(
    tmp_path, monkeypatch, small_batches, error, threads, name
):
    def fail(*_):
        raise error("in vain")

    monkeypatch.setattr(packing_batches, name, fail)
    plan = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4())
    with pytest.raises(error, match="in vain"):
        batched(plan, HostFeed(count=1), threads)
    assert none_reads_any_more()


def test_a_copy_that_fails_gives_its_slot_back(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("refused")

    monkeypatch.setattr(HostFeed, "copy", refuse)
    feed = HostFeed(count=1)
    with pytest.raises(RuntimeError, match="refused"):
        batched(packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4()), feed)
    assert none_reads_any_more()
    assert feed.slots._free.qsize() <= 1


# --- slots -------------------------------------------------------------------------------------------------------


class Copies:
    """A stream, and the event that all on it has come to pass; neither has until somebody waits."""

    waited = False

    def record_event(self):
        return self

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


def test_a_slot_is_taken_again_once_the_copies_from_it_are_done():
    slots, copies = Slots(), Copies()
    slots.give(slot := Slot(torch.empty(1), memoryview(b" ")), copies)
    assert not copies.waited
    assert slots.take() is slot
    assert copies.waited


def test_lanes_and_packing_share_slots(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    slots, copies = HostFeed(count=1).slots, Copies()
    lane = CudaLane(torch.device("cuda"), copies, slots)
    held = lane.slot()
    assert slots._free.empty()
    lane.sent()
    assert slots.take() is held
    assert copies.waited


def test_pinned_slots_go_when_they_are_unpinned(monkeypatch):
    monkeypatch.setattr(device, "_pinned", lambda nbytes: torch.empty(8, dtype=torch.uint8))
    monkeypatch.setattr(device, "_enter_context", lambda: None)
    slots = PinnedSlots()
    taken = [slots.take() for _ in range(SLOTS)]
    memory = [weakref.ref(slot.tensor) for slot in taken]
    while taken:
        slots.give(taken.pop())
    slots.unpin()
    for thread in threading.enumerate():
        if thread.name == "moebius-unpinning":
            thread.join()
    assert not [ref for ref in memory if ref()]


def test_memory_that_cannot_be_pinned_is_an_error_of_who_waits_for_it(monkeypatch):
    def refuse(nbytes):
        raise CapacityError("no memory can be pinned")

    monkeypatch.setattr(device, "_pinned", refuse)
    with pytest.raises(CapacityError, match="no memory can be pinned"):
        PinnedSlots().take()
