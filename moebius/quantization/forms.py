"""The quantized forms that checkpoints are published in, as data: shapes, dtypes, byte counts.  No torch.

A weight [..., out, in] in such a form is two tensors: values and scales, both with the weight's leading axes.  Leading
axes (experts) never share anything; `segments` matrices may be stacked on the `out` axis (gate and up: 2), and the
scales of each begin anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Spec(NamedTuple):
    """A tensor to be: its shape, and torch's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Mxfp4:
    """Two e2m1 codes a byte, low nibble first, 32 inputs a block; one e8m0 scale a block: code * 2^(scale - 127)
    (OCP Microscaling Formats v1.0, sections 5.2 and 5.3).

    values: uint8 [..., out, in/32, 16].  scales: uint8 [..., out, in/32].
    """

    name: ClassVar[str] = "mxfp4"
    quantum_rows: ClassVar[int] = 1
    block: ClassVar[int] = 32

    def quantum(self, width: int) -> tuple[int, int]:
        """(rows, columns) of what can be quantized by itself, in a weight of so many inputs."""
        return 1, self.block

    def values(self, shape: Sequence[int]) -> Spec:
        *lead, width = shape
        return Spec((*lead, _whole(width, self.block, self.name), self.block // 2), "uint8")

    def scales(self, shape: Sequence[int], segments: int = 1) -> Spec:
        *lead, width = shape
        return Spec((*lead, _whole(width, self.block, self.name)), "uint8")

    def weight_shape(self, values: Sequence[int]) -> tuple[int, ...]:
        """The weight's shape, from that of its values."""
        *lead, blocks, _ = values
        return (*lead, blocks * self.block)


@dataclass(frozen=True)
class BlockFp8:
    """e4m3 values, and one scale a block of `block` = (rows, columns), the last of which may be partial: value * scale
    (DeepSeek-V3, arXiv 2412.19437, section 3.3; its README_WEIGHTS).

    values: float8_e4m3fn [..., out, in].  scales: [..., ceil(out / rows), ceil(in / columns)] of scale_dtype, which
    is "float32" or "float8_e8m0fnu".
    """

    block: tuple[int, int] = (128, 128)
    scale_dtype: str = "float32"

    name: ClassVar[str] = "fp8_block"

    @property
    def quantum_rows(self) -> int:
        return self.block[0]

    def quantum(self, width: int) -> tuple[int, int]:
        """(rows, columns) of what can be quantized by itself, in a weight of so many inputs."""
        return self.block

    def values(self, shape: Sequence[int]) -> Spec:
        return Spec(tuple(shape), "float8_e4m3fn")

    def scales(self, shape: Sequence[int], segments: int = 1) -> Spec:
        *lead, rows, columns = shape
        grid = segments * math.ceil(rows // segments / self.block[0]), math.ceil(columns / self.block[1])
        return Spec((*lead, *grid), self.scale_dtype)

    def weight_shape(self, values: Sequence[int]) -> tuple[int, ...]:
        """The weight's shape, from that of its values."""
        return tuple(values)


@dataclass(frozen=True)
class PackedInt4:
    """Symmetric 4-bit integers q in [-8, 7], stored as q + 8, eight an int32, lowest nibble first; one scale a group
    of `group_size` inputs: q * scale (compressed-tensors, pack-quantized).

    values: int32 [..., out, in/8].  scales: [..., out, in/group_size] of scale_dtype, a float.
    """

    group_size: int = 32
    scale_dtype: str = "bfloat16"

    name: ClassVar[str] = "int4_pack"
    quantum_rows: ClassVar[int] = 1

    def quantum(self, width: int) -> tuple[int, int]:
        """(rows, columns) of what can be quantized by itself, in a weight of so many inputs."""
        return 1, self.group_size

    def values(self, shape: Sequence[int]) -> Spec:
        *lead, width = shape
        return Spec((*lead, _whole(width, 8, self.name)), "int32")

    def scales(self, shape: Sequence[int], segments: int = 1) -> Spec:
        *lead, width = shape
        return Spec((*lead, _whole(width, self.group_size, self.name)), self.scale_dtype)

    def weight_shape(self, values: Sequence[int]) -> tuple[int, ...]:
        """The weight's shape, from that of its values."""
        *lead, words = values
        return (*lead, words * 8)


@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit integers q in [-128, 127] and one scale a row: q * scale (compressed-tensors, int-quantized, a
    scale a channel).

    values: int8 [..., out, in].  scales: [..., out, 1] of scale_dtype, a float.
    """

    scale_dtype: str = "float32"

    name: ClassVar[str] = "int8_row"
    quantum_rows: ClassVar[int] = 1

    def quantum(self, width: int) -> tuple[int, int]:
        """(rows, columns) of what can be quantized by itself, in a weight of so many inputs."""
        return 1, width

    def values(self, shape: Sequence[int]) -> Spec:
        return Spec(tuple(shape), "int8")

    def scales(self, shape: Sequence[int], segments: int = 1) -> Spec:
        return Spec((*shape[:-1], 1), self.scale_dtype)

    def weight_shape(self, values: Sequence[int]) -> tuple[int, ...]:
        """The weight's shape, from that of its values."""
        return tuple(values)


Form = Mxfp4 | BlockFp8 | PackedInt4 | Int8


def _whole(width: int, unit: int, name: str) -> int:
    if width % unit:
        raise ValueError(f"{name} takes inputs in groups of {unit}; {width} is no multiple")
    return width // unit
