"""How the matrices of all experts lie, plain or in a quantized form, as kernels that decode in registers read them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebius.errors import BackendError
from moebius.experts.fused.quantized_values import FP8, INT4, INT8, MXFP4, PLAIN
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

TWO_TO_23 = 0x4B000000
"""The bits of the float 2^23, which kernels take at run time."""
TWICE_16, TWICE_128 = 0x41804180, 0x43004300
"""Those of two bfloat16 of 16 and of 128."""


@dataclass(frozen=True)
class Matrices:
    """A projection of all experts: values [E, ...] and scales [E, ...], in dtypes that kernels take.

    scale_block: (rows, inputs) that share a scale.  run: inputs that a thread takes at once, within one scale.
    dots: they lie as `decode_dots` reads them.
    """

    name: str
    values: Tensor
    scales: Tensor | None
    kind: int
    out_features: int
    in_features: int
    scale_block: tuple[int, int]
    run: int
    dots: bool = False

    @classmethod
    def of(cls, projection: str, values: Tensor, form: Form | None, scales: Tensor | None) -> "Matrices":
        """values [E, out, in], or as the form lays them out.  projection: its name, for errors.

        BackendError: they are not contiguous, or the form's groups are no multiples of what a load takes.
        """
        if not values.is_contiguous() or (scales is not None and not scales.is_contiguous()):
            raise BackendError(f"{projection}: expected contiguous weights", advice="call .contiguous() on them once")
        _, rows, width = values.shape if form is None else form.weight_shape(values.shape)
        kind, block, run = reading(form, values.element_size(), width)
        words = values.view(torch.int32) if isinstance(form, Mxfp4) else values
        return cls(
            "plain" if form is None else form.name,
            words,
            None if scales is None else _as_numbers(scales),
            kind,
            rows,
            width,
            block,
            run,
        )

    def dotted(self, dtype: torch.dtype) -> "Matrices | None":
        """As `decode_dots` reads them, in words of 32 bits; a run is what four threads load, or one.  None: not
        this form, its groups or its width, or not with inputs of this dtype.
        """
        per_word = {INT8.value: 4, INT4.value: 8}.get(self.kind)
        if dtype != torch.bfloat16 or per_word is None:
            return None
        quad, columns = 16 * per_word, self.scale_block[1]
        whole = columns >= self.in_features or columns % quad == 0
        if self.in_features % per_word or not (whole or columns % (quad // 4) == 0):
            return None
        run = quad if whole else quad // 4
        return replace(self, values=self.values.view(torch.int32), run=run, dots=True)

    @property
    def number(self) -> int:
        """The bits that values are set into."""
        if not self.dots:
            return TWO_TO_23
        return TWICE_16 if self.kind == INT4.value else TWICE_128

    @property
    def constants(self) -> dict[str, int]:
        """What kernels take to read them; VALUES and SCALES are elements an expert."""
        rows, columns = self.scale_block
        sizes = {"VALUES": self.values.stride(0), "SCALES": 0 if self.scales is None else self.scales.stride(0)}
        return {**sizes, "KIND": self.kind, "SCALE_ROWS": rows, "SCALE_COLUMNS": columns, "RUN": self.run}


def reading(form: Form | None, itemsize: int, width: int) -> tuple[int, tuple[int, int], int]:
    """(kind, scale_block, run) of a form; a run is at most 16 bytes of values, and lies within one scale."""
    match form:
        case None:
            return PLAIN.value, (1, width), 16 // itemsize
        case Int8():
            return INT8.value, (1, width), 16
        case BlockFp8(block):
            return FP8.value, block, math.gcd(16, block[1]) if block[1] < width else 16
        case PackedInt4(group_size):
            return INT4.value, (1, group_size), _code_run(group_size)
        case Mxfp4():
            return MXFP4.value, (1, form.block), form.block


def _code_run(group_size: int) -> int:
    if group_size % 8:
        raise BackendError(f"int4_pack: expected groups of a multiple of 8 inputs, found {group_size}")
    return math.gcd(32, group_size)


def _as_numbers(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
