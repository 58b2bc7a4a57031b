"""Which weights of a model a QuantizationConfig means."""

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from moebius.errors import ArgumentError, Fault
from moebius.experts.contract import SEGMENTS
from moebius.layers.roles import Role, parameter_roles
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.decoding import layout
from moebius.quantization.forms import Form

ROLES: Mapping[str, tuple[Role, ...]] = {
    "experts": ("routed_experts",),
    "linears": ("attention", "dense_mlp", "shared_experts"),
}
ADVICE = "leave them plain by modules_to_not_convert=[...], or take a form that fits"


def forms_for(model: nn.Module, config: QuantizationConfig) -> dict[str, Form]:
    """The weights to be quantized, by name, each in the config's form.  Works on meta.

    ArgumentError: weights that the form does not take, names that fit no module, or nothing left to quantize; all that
    was found.
    """
    form, wanted = config.weight_form, _wanted(model, config)
    faults = [
        Fault(entry, "no such module", "modules_to_not_convert takes the model's own names")
        for entry in config.modules_to_not_convert
        if not any(_names(entry, name) for name in _modules(model))
    ]
    faults += [fault for name in wanted if (fault := _shape_fault(model, name, form))]
    faults += [Fault(name, "cannot be quantized", "it is tied to another weight") for name in _tied(model, wanted)]
    if not faults and not wanted:
        faults = [Fault("modules_to_not_convert", "nothing is left", f"parts: {', '.join(config.wanted_parts)}")]
    if faults:
        raise ArgumentError(f"this model cannot be quantized to {config.form}", faults=faults, advice=ADVICE)
    return dict.fromkeys(wanted, form)


def segments_of(name: str) -> int:
    """How many matrices the weight of this name stacks."""
    return SEGMENTS.get(name.rpartition(".")[2], 1)


def _wanted(model: nn.Module, config: QuantizationConfig) -> list[str]:
    roles = {role for part in config.wanted_parts for role in ROLES[part]}
    return [
        name
        for name, role in parameter_roles(model).items()
        if role in roles and _is_projection(model, name) and not _left_plain(config.modules_to_not_convert, name)
    ]


def _is_projection(model: nn.Module, name: str) -> bool:
    """A matrix that multiplies; what has a single row is a gate."""
    path, _, own_name = name.rpartition(".")
    match model.get_submodule(path):
        case nn.Linear() as linear:
            return own_name == "weight" and linear.out_features > 1
        case _:
            return own_name in SEGMENTS


def _left_plain(entries: Iterable[str], name: str) -> bool:
    return any(_names(entry, name.removesuffix(".weight")) for entry in entries)


def _names(entry: str, module: str) -> bool:
    """Whether the entry's segments stand in the module's name, one after the other."""
    wanted, parts = entry.split("."), module.split(".")
    heads = range(len(parts) - len(wanted) + 1)
    return any(all(map(_fits, wanted, parts[at : at + len(wanted)])) for at in heads)


def _fits(wanted: str, part: str) -> bool:
    return wanted == part or (wanted == "*" and part.isdecimal())


def _modules(model: nn.Module) -> list[str]:
    return [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]


def _tied(model: nn.Module, names: Iterable[str]) -> list[str]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [name for name in names if uses[id(model.get_parameter(name))] > 1]


def _shape_fault(model: nn.Module, name: str, form: Form) -> Fault | None:
    try:
        layout(form, model.get_parameter(name).shape, segments_of(name))
    except ArgumentError as error:
        return Fault(name, "shape", error.message)
    return None
