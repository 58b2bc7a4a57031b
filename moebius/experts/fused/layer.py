"""A layer's experts as an operator of torch can take them: tensors, and the rest spelled out in strings.

E experts, H hidden, I intermediate.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from moebius.config import Activation, ClampedSwiGLU, SwiGLU
from moebius.experts.contract import ExpertWeights
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4


@dataclass(frozen=True)
class Projection:
    """One of a layer's two.  weight [E, out, in], or a form's values, and then scales as the form lays them out."""

    name: str
    weight: Tensor
    bias: Tensor | None
    form: Form | None
    scales: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, out, in), whatever the form."""
        return tuple(self.weight.shape) if self.form is None else self.form.weight_shape(self.weight.shape)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """An `ExpertWeights` of plain fields."""

    gate_up_proj: Tensor  # [E, 2I, H], or a form's values
    down_proj: Tensor  # [E, H, I], or a form's values
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None
    gate_up_proj_scale: Tensor | None
    down_proj_scale: Tensor | None
    gate_up_proj_form: Form | None
    down_proj_form: Form | None
    activation: Activation
    num_routed: int

    @property
    def num_experts(self) -> int:
        return len(self.gate_up_proj)

    @property
    def gate_up(self) -> Projection:
        form, scales = self.gate_up_proj_form, self.gate_up_proj_scale
        return Projection("gate_up_proj", self.gate_up_proj, self.gate_up_proj_bias, form, scales)

    @property
    def down(self) -> Projection:
        return Projection("down_proj", self.down_proj, self.down_proj_bias, self.down_proj_form, self.down_proj_scale)


def tensors_of(experts: ExpertWeights) -> tuple[Tensor | None, ...]:
    """The tensors of a layer, in the order of Layer's fields."""
    return (
        experts.gate_up_proj,
        experts.down_proj,
        experts.gate_up_proj_bias,
        experts.down_proj_bias,
        experts.gate_up_proj_scale,
        experts.down_proj_scale,
    )


def spelled(experts: ExpertWeights) -> str:
    """All but the tensors, for `layer_of`; comparisons of types alone, as torch.compile reads this."""
    forms = experts.gate_up_proj_form, experts.down_proj_form
    return ";".join([*map(_spelled_form, forms), _spelled_activation(experts.activation), str(experts.num_routed)])


def layer_of(
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    gate_up_proj_scale: Tensor | None,
    down_proj_scale: Tensor | None,
    spelling: str,
) -> Layer:
    """tensors as from `tensors_of`, spelling as from `spelled`."""
    gate_up_form, down_form, activation, num_routed = spelling.split(";")
    return Layer(
        gate_up_proj,
        down_proj,
        gate_up_proj_bias,
        down_proj_bias,
        gate_up_proj_scale,
        down_proj_scale,
        _form(gate_up_form, gate_up_proj_scale),
        _form(down_form, down_proj_scale),
        _activation(activation),
        int(num_routed),
    )


def _spelled_form(form: Form | None) -> str:
    if isinstance(form, BlockFp8):
        return f"fp8_block {form.block[0]} {form.block[1]}"
    if isinstance(form, PackedInt4):
        return f"int4_pack {form.group_size}"
    return "plain" if form is None else form.name


def _form(spelling: str, scales: Tensor | None) -> Form | None:
    scale_dtype = "" if scales is None else str(scales.dtype).removeprefix("torch.")
    match spelling.split():
        case ["fp8_block", rows, columns]:
            return BlockFp8((int(rows), int(columns)), scale_dtype)
        case ["int4_pack", group_size]:
            return PackedInt4(int(group_size), scale_dtype)
        case ["int8_row"]:
            return Int8(scale_dtype)
        case ["mxfp4"]:
            return Mxfp4()
        case _:
            return None


def _spelled_activation(activation: Activation) -> str:
    if isinstance(activation, ClampedSwiGLU):
        return f"clamped {activation.alpha!r} {activation.limit!r}"
    return "swiglu"


def _activation(spelling: str) -> Activation:
    match spelling.split():
        case ["clamped", alpha, limit]:
            return ClampedSwiGLU(float(alpha), float(limit))
        case _:
            return SwiGLU()
