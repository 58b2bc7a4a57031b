"""Pinned slots: they go round among lanes, and none is filled while a copy from it is on its way."""

import threading
import weakref

import pytest
import torch

from moebius.checkpoint import device
from moebius.checkpoint.device import SLOTS, CudaLane, PinnedSlots, Slot, Slots
from moebius.errors import CapacityError
from tests.checkpoint.test_packing_batches import Copies, HostFeed


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
    assert lane.sent() is copies
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
