"""Models whose weights stay in quantized forms: which weights can, and what takes their place."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.errors import ArgumentError, Fault
from moebius.experts.contract import SEGMENTS
from moebius.experts.interface import Experts
from moebius.quantization.decoding import dequantize, layout
from moebius.quantization.fixed_dtypes import FixedDtypes
from moebius.quantization.forms import Form
from moebius.quantization.held import held_linear, room


class QuantizedLinear(FixedDtypes):
    """A linear layer with its weight in a quantized form: [..., in] -> [..., out].

    weight, weight_scale: the form's values and scales, without gradient.  bias [out]: a parameter, or None.
    """

    def __init__(self, linear: nn.Linear, form: Form) -> None:
        """In the place of `linear`, whose shape, device and bias it takes; its weight is not filled."""
        super().__init__()
        self.form = form
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.weight_scale = room(form, linear.weight.shape, linear.weight.device)
        self.bias: nn.Parameter | None = linear.bias
        self.fix_dtypes("weight", "weight_scale")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return held_linear(hidden_states, self.form, self.weight, self.weight_scale, self.bias)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], decoded."""
        return dequantize(self.form, self.weight, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


def can_hold(model: nn.Module, name: str) -> bool:
    """Whether the model's weight of this name may stay in a quantized form: a linear layer's or its experts', plain so
    far and not tied to another.
    """
    return not _obstacle(model, name, _tied(model))


def hold(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Make room in the model for weights in quantized forms; what stood there is dropped.  Works on meta.

    forms: by the weight's name, such as "model.layers.0.self_attn.q_proj.weight", whose scales are then found at
    "...q_proj.weight_scale", or "model.layers.0.mlp.experts.down_proj", with "...down_proj_scale".
    ArgumentError: weights that cannot be held, or not in that form, all of them named; nothing was changed.
    """
    tied = _tied(model) if forms else {}
    faults = [fault for name, form in forms.items() for fault in _faults(model, name, form, tied)]
    if faults:
        raise ArgumentError("these weights cannot be held in a quantized form", faults=faults)
    for name, form in forms.items():
        _hold(model, name, form)


def _hold(model: nn.Module, name: str, form: Form) -> None:
    path, _, own_name = name.rpartition(".")
    match model.get_submodule(path):
        case Experts() as experts:
            experts.hold(own_name, form)
        case nn.Linear() as linear:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(linear, form))


def _tied(model: nn.Module) -> dict[str, bool]:
    """Of each parameter, by name: whether it stands under another name too."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    return {name: uses[id(parameter)] > 1 for name, parameter in parameters.items()}


def _faults(model: nn.Module, name: str, form: Form, tied: Mapping[str, bool]) -> list[Fault]:
    obstacle = _obstacle(model, name, tied)
    if obstacle:
        return [Fault(name, "cannot be held", obstacle)]
    try:
        layout(form, model.get_parameter(name).shape)
    except ArgumentError as error:
        return [Fault(name, "shape", error.message)]
    return []


def _obstacle(model: nn.Module, name: str, tied: Mapping[str, bool]) -> str:
    """Why the weight of this name cannot be held in any form; empty if it can.  tied: see `_tied`."""
    if name not in tied:
        return "the model has no such parameter"
    if tied[name]:
        return "it is tied to another weight"
    path, _, own_name = name.rpartition(".")
    match model.get_submodule(path):
        case nn.Linear() if own_name == "weight":
            return ""
        case Experts() as experts if own_name in SEGMENTS:
            return "it is already" if experts.form_of(own_name) else ""
        case QuantizedLinear() if own_name == "weight":
            return "it is already"
        case module:
            return f"linear layers and experts can; this is the {own_name} of {type(module).__name__}"
