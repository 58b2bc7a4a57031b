"""One expert's rows times its weight on a CPU, by what the weight is held in and by how many rows there are.

E experts, M rows of one expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.experts import cpu_operators
from moebius.experts.contract import SEGMENTS, ExpertWeights
from moebius.experts.cpu_packing import PackedCopies
from moebius.quantization.decoding import dequantize
from moebius.quantization.forms import Form, Int8, PackedInt4

# Below so many rows of an expert its product waits for the weight rather than for the arithmetic.
FEW_ROWS, FEW_ROWS_INT8 = 64, 8
# oneDNN reads a packed weight a fifth to a third slower for one or two rows than for four (Zen 4, torch 2.13).
LEAST_ROWS = 4


class Projection(NamedTuple):
    """A projection as its layer holds it: values and scales of all E experts, as `form` lays them out."""

    values: Tensor
    form: Form | None
    scales: Tensor | None
    bias: Tensor | None  # [E, out]
    segments: int

    @property
    def sources(self) -> list[Tensor]:
        """What copies of its weights are made of."""
        return [self.values] if self.scales is None else [self.values, self.scales]

    def bias_of(self, expert: int) -> Tensor | None:
        return None if self.bias is None else self.bias[expert]


def projections(experts: ExpertWeights) -> tuple[Projection, Projection]:
    """gate_up_proj and down_proj."""
    return (
        Projection(
            experts.gate_up_proj,
            experts.gate_up_proj_form,
            experts.gate_up_proj_scale,
            experts.gate_up_proj_bias,
            SEGMENTS["gate_up_proj"],
        ),
        Projection(
            experts.down_proj,
            experts.down_proj_form,
            experts.down_proj_scale,
            experts.down_proj_bias,
            SEGMENTS["down_proj"],
        ),
    )


class Workspace:
    """A place, used again for each expert, for a weight in the dtype that products of many rows are taken in."""

    def __init__(self, states: torch.dtype):
        """states: the dtype of hidden states, which widens to float32 where the CPU is slow at it."""
        self.states = states
        self.dtype = states if cpu_operators.multiplies(states) else torch.float32
        self._place = torch.empty(0, dtype=self.dtype)

    def filled(self, weight: Tensor) -> Tensor:
        """`weight` in this dtype, until the next call."""
        if weight.dtype == self.dtype:
            return weight
        if self._place.numel() < weight.numel():
            self._place = torch.empty(weight.numel(), dtype=self.dtype)
        return self._place[: weight.numel()].view(weight.shape).copy_(weight)

    def few(self, rows: Tensor, limit: int) -> bool:
        """Whether rows are for an operator that takes less than so many, in bfloat16."""
        return self.states == torch.bfloat16 and len(rows) < limit


def product(
    projection: Projection, expert: int, rows: Tensor, copies: PackedCopies[Any], workspace: Workspace
) -> Tensor:
    """rows [M, in] through one expert's projection: [M, out], in the states' dtype or in float32, as rows are."""
    if projection.form is None or projection.scales is None:
        return _plain(projection, expert, rows, copies, workspace)
    weight = _HeldExpert(projection.form, projection.values[expert], projection.scales[expert], projection.segments)
    bias = projection.bias_of(expert)
    columns = _held(weight, expert, rows, copies, workspace)
    return columns if bias is None else columns.float().add_(bias)


def _plain(
    projection: Projection, expert: int, rows: Tensor, copies: PackedCopies[Tensor], workspace: Workspace
) -> Tensor:
    weight, bias = projection.values[expert], projection.bias_of(expert)
    if len(rows) >= FEW_ROWS and workspace.dtype != weight.dtype:
        return _linear(rows, workspace.filled(weight), bias)
    packed = copies.of(expert, lambda: cpu_operators.pack_linear(weight.contiguous()))
    padded = F.pad(rows, (0, 0, 0, LEAST_ROWS - len(rows))) if len(rows) < LEAST_ROWS else rows
    return cpu_operators.packed_linear(padded.to(weight.dtype), packed, bias)[: len(rows)]


class _HeldExpert(NamedTuple):
    form: Form
    values: Tensor
    scales: Tensor
    segments: int


def _held(
    weight: _HeldExpert, expert: int, rows: Tensor, copies: PackedCopies[tuple[Tensor, Tensor]], workspace: Workspace
) -> Tensor:
    match weight.form:
        case Int8():
            return _int8(weight, rows, workspace)
        case PackedInt4() as form if _suits_int4(form, weight) and workspace.few(rows, FEW_ROWS):
            packed, scales = copies.of(expert, lambda: _pack_int4(weight))
            return cpu_operators.int4_product(rows.bfloat16(), packed, form.group_size, scales)
        case form:
            decoded = dequantize(form, weight.values, weight.scales, workspace.dtype, weight.segments)
            return _linear(rows, decoded, None)


def _suits_int4(form: PackedInt4, weight: _HeldExpert) -> bool:
    shapes = form.group_size in cpu_operators.INT4_GROUPS and len(weight.values) % cpu_operators.INT4_ROWS == 0
    return shapes and form.scale_dtype == "bfloat16" and cpu_operators.int4_works()


def _pack_int4(weight: _HeldExpert) -> tuple[Tensor, Tensor]:
    """Codes as `int4_product` reads them, and beside them each group's scale and its zero point, which is zero."""
    words = weight.values.contiguous().view(torch.uint8)  # the lowest nibble of an int32 lies in its first byte
    codes = torch.stack((words & 15, words >> 4), dim=-1).flatten(-2)
    scales = weight.scales.t()
    return cpu_operators.pack_int4(codes.int()), torch.stack((scales, torch.zeros_like(scales)), dim=-1)


def _int8(weight: _HeldExpert, rows: Tensor, workspace: Workspace) -> Tensor:
    """In float32: the scale, one a row of the weight, is multiplied after the product."""
    if workspace.few(rows, FEW_ROWS_INT8) and cpu_operators.int8_works():
        columns = cpu_operators.int8_product(rows.bfloat16(), weight.values)
    else:
        columns = _linear(rows, workspace.filled(weight.values), None)
    return columns.float().mul_(weight.scales.flatten())


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the weight's dtype."""
    return F.linear(rows.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
