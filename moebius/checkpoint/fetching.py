"""Bytes of tensors in host memory, ready to be written, wherever the tensors are: the way of device.py backwards.

Each writer has a lane to every device on which the model lies.  Of a CPU tensor it hands out the memory itself, also
if that is mapped pages of a file; of a CUDA tensor, a copy in its own slot of pinned memory.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moebius.checkpoint.blocks import Block, cut, whole_block
from moebius.checkpoint.operations import Part
from moebius.checkpoint.planning import STAGING_BYTES
from moebius.checkpoint.reading import raw_bytes
from moebius.checkpoint.reversing import PAGE_BYTES

CAST_ELEMENTS = 1 << 15  # torch copies so many on one thread; more would start a team of threads in every writer
WRITE_BYTES = 1 << 20  # of one write, and of a pinned slot; longer ones are not faster, and less steady


class Lane(Protocol):
    """One writer's way from one device; what it gives holds until it is asked again."""

    def scratch(self) -> Tensor:
        """STAGING_BYTES of memory (uint8) on the device."""
        ...

    def place(self, scratch: Tensor, block: Block, tensor: Tensor) -> None:
        """Copies the block of `tensor` to its place in `scratch`, with a cast if the dtypes differ."""
        ...

    def host(self, found: Tensor) -> memoryview:
        """The bytes of a contiguous tensor of at most WRITE_BYTES, in host memory."""
        ...


class CpuLane:
    """A Lane from host memory; see Lane."""

    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def scratch(self) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        return self._scratch

    def place(self, scratch: Tensor, block: Block, tensor: Tensor) -> None:
        for part in cut(block, CAST_ELEMENTS):
            _copy(scratch, part, tensor)

    def host(self, found: Tensor) -> memoryview:
        """Touches every page: a write that meets mapped pages nobody has read goes on in small steps, at half speed."""
        found.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        return raw_bytes(found)


class CudaLane:
    """A Lane from a CUDA device, after all that is under way on its current stream; see Lane."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._slot: Tensor | None = None
        self._scratch: Tensor | None = None

    def scratch(self) -> Tensor:
        if self._scratch is None:
            with torch.cuda.stream(self._stream):
                self._scratch = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=self._device)
        return self._scratch

    def place(self, scratch: Tensor, block: Block, tensor: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            _copy(scratch, block, tensor)

    def host(self, found: Tensor) -> memoryview:
        if self._slot is None:
            self._slot = torch.empty(WRITE_BYTES, dtype=torch.uint8, pin_memory=True)
        place = self._slot[: found.nbytes]
        with torch.cuda.stream(self._stream):
            place.copy_(found.reshape(-1).view(torch.uint8), non_blocking=True)
        self._stream.synchronize()
        return raw_bytes(place)


def lanes_to(devices: Iterable[torch.device]) -> Mapping[torch.device, Lane]:
    """One writer's lanes.  To be called where the tensors' last work was set off."""
    return {device: CudaLane(device) if device.type == "cuda" else CpuLane() for device in devices}


def block_in(part: Part, stored: tuple[int, ...], tensor: Tensor) -> Block:
    """The part as a block whose offset and strides are those of the tensor's storage, be it contiguous or not."""
    block, origin, steps = whole_block(part, stored, tensor.shape), part.origin, tensor.stride()
    offset = tensor.storage_offset() + sum(index * step for index, step in zip(origin.start, steps, strict=True))
    strides = tuple(step * steps[axis] for axis, step in zip(origin.axes, origin.steps, strict=True))
    return replace(block, offset=offset, strides=strides)


def _copy(scratch: Tensor, block: Block, tensor: Tensor) -> None:
    found = tensor.as_strided(block.shape, block.strides, block.offset)
    scratch.as_strided(block.shape, block.stored_strides, block.start).copy_(found)
