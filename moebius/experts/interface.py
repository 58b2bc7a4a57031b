"""The pluggable seam: the Experts module, and the registry of functions that run it.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from moebius.config import SparseMoe
from moebius.errors import ArgumentError, BackendError, Fault
from moebius.experts.batched_mm import batched_mm_experts
from moebius.experts.contract import SEGMENTS, ExpertsFunction, ExpertWeights
from moebius.experts.cpu import cpu_experts
from moebius.experts.eager import eager_experts
from moebius.experts.grouped_mm import grouped_mm_experts
from moebius.experts.select import Choice, Situation, backend_obstacles, select_backend
from moebius.quantization.fixed_dtypes import FixedDtypes
from moebius.quantization.forms import Form
from moebius.quantization.held import room

AUTO = "auto"
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
logger = logging.getLogger(__name__)


class ExpertsInterface(Mapping[str, ExpertsFunction]):
    """Backends by name.  `register` is where users plug in their own."""

    def __init__(self, functions: Mapping[str, ExpertsFunction]):
        self._functions = dict(functions)

    def register(self, name: str, function: ExpertsFunction) -> None:
        """Add a backend, or replace the one of this name.

        ArgumentError: "auto", which is a choice among backends, and "eager", which defines what the others must give.
        """
        if name in (AUTO, "eager"):
            raise ArgumentError(f"the name {name!r} cannot be registered: take another one")
        self._functions[name] = function

    def check(self, name: str) -> str:
        """`name`, if it is a backend or "auto".  BackendError: unknown; the nearest known names come first."""
        known = [AUTO, *self._functions]
        if name in known:
            return name
        nearest = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        raise BackendError(
            f"experts_implementation: unknown backend {name!r}; known: {', '.join(nearest)}",
            advice="take one of these, or add yours with ALL_EXPERTS_FUNCTIONS.register(name, function)",
        )

    def __getitem__(self, name: str) -> ExpertsFunction:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def _fused_experts(experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See `fused.launch.fused_experts`; Triton is imported when it is first run."""
    from moebius.experts.fused.launch import fused_experts

    return fused_experts(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS = ExpertsInterface(
    {
        "eager": eager_experts,
        "batched_mm": batched_mm_experts,
        "grouped_mm": grouped_mm_experts,
        "fused": _fused_experts,
        "cpu": cpu_experts,
    }
)


def use_experts_implementation(experts_class: ModuleClass) -> ModuleClass:
    """Class decorator: `forward` runs the backend that `self.experts_implementation` names.

    The class's own forward is what "eager" runs.  BackendError: the backend is unknown, or cannot run here; it is never
    replaced in silence.
    """
    own_forward = experts_class.forward

    @functools.wraps(own_forward)
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and _any_gradient(self, hidden_states, top_k_weights)
        situation = _situation(self, hidden_states.device, hidden_states.dtype, needs_grad)
        name = _choice(self.experts_implementation, situation).name
        run = own_forward if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
        # under autocast the states may be narrower than the weights, and grouped products take one dtype
        states = hidden_states.to(_compute_dtype(self, hidden_states.dtype))
        return run(self, states, top_k_index, top_k_weights).to(hidden_states.dtype)

    experts_class.forward = forward
    return experts_class


@use_experts_implementation
class Experts(FixedDtypes):
    """The routed experts of one layer, packed, plain or in quantized forms; see `contract.ExpertWeights`.

    experts_implementation: a name in ALL_EXPERTS_FUNCTIONS, or "auto".
    waits: whether the device stands idle for a part of forward, so that other work is worth doing beside it.
    """

    waits: bool = False

    def __init__(self, config: SparseMoe, hidden_size: int, *, experts_implementation: str = AUTO) -> None:
        super().__init__()
        self.num_experts = self.num_routed = config.num_experts
        self.activation = config.activation
        self.experts_implementation = ALL_EXPERTS_FUNCTIONS.check(experts_implementation)
        self.gate_up_proj_form: Form | None = None
        self.down_proj_form: Form | None = None
        gate_up_rows, rows = 2 * config.intermediate_size, hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, gate_up_rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, rows, config.intermediate_size))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(config.num_experts, gate_up_rows)) if config.bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(config.num_experts, rows)) if config.bias else None
        self.gate_up_proj_scale: nn.Parameter | None = None
        self.down_proj_scale: nn.Parameter | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]."""
        return eager_experts(self, hidden_states, top_k_index, top_k_weights)

    def begin(self, hidden_states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """What takes the rest, top_k_index and top_k_weights, to compute forward: what needs the states alone may be
        under way meanwhile.  It is to be called, once.
        """
        return functools.partial(self, hidden_states)

    def set_experts_implementation(self, name: str) -> None:
        """Take another backend from now on.  BackendError: unknown name."""
        self.experts_implementation = ALL_EXPERTS_FUNCTIONS.check(name)
        cpu_experts.release(self)

    def choice(self, device: str | torch.device, dtype: torch.dtype, *, needs_grad: bool = False) -> Choice:
        """What runs on states of this dtype there, and why: the backend that was named, or what "auto" chooses.

        needs_grad: a backward will follow.  BackendError: the named one cannot.
        """
        return _choice(self.experts_implementation, _situation(self, torch.device(device), dtype, needs_grad))

    def hold(self, projection: str, form: Form) -> None:
        """Make room for a projection in a quantized form: its values, and its scales as `<projection>_scale`, neither
        with a gradient.  What it held is dropped.

        projection: "gate_up_proj" or "down_proj".  ArgumentError: it is held already, or its shape has no such form.
        """
        if self.form_of(projection) is not None:
            raise ArgumentError(f"{projection} is held as {self.form_of(projection)} already")
        weight = self.get_parameter(projection)
        values, scales = room(form, weight.shape, weight.device, SEGMENTS[projection])
        for name, value in {"": values, "_scale": scales, "_form": form}.items():
            setattr(self, projection + name, value)
        self.fix_dtypes(projection, f"{projection}_scale")

    def form_of(self, projection: str) -> Form | None:
        """What a projection is held in; None for a plain one."""
        return {"gate_up_proj": self.gate_up_proj_form, "down_proj": self.down_proj_form}[projection]


def _any_gradient(experts: Experts, *inputs: Tensor) -> bool:
    weights = experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias
    return any(tensor is not None and tensor.requires_grad for tensor in (*inputs, *weights))


def _situation(experts: Experts, device: torch.device, states: torch.dtype, needs_grad: bool) -> Situation:
    down_form, values = experts.down_proj_form, experts.down_proj.shape
    _, hidden_size, intermediate_size = values if down_form is None else down_form.weight_shape(values)
    forms = {form.name: None for form in (experts.gate_up_proj_form, down_form) if form is not None}
    return Situation(
        device.type,
        _compute_dtype(experts, states),
        hidden_size,
        intermediate_size,
        tuple(forms),
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        needs_grad,
    )


def _compute_dtype(experts: Experts, states: torch.dtype) -> torch.dtype:
    """That of what is plain, the biases included; that of the states where nothing is."""
    projections = (experts.gate_up_proj_form, experts.gate_up_proj), (experts.down_proj_form, experts.down_proj)
    plain = [weight for form, weight in projections if form is None]
    plain += [bias for bias in (experts.gate_up_proj_bias, experts.down_proj_bias) if bias is not None]
    return plain[0].dtype if plain else states


def _choice(name: str, situation: Situation) -> Choice:
    """The backend to run: `name` itself if it can run here, or what "auto" chooses."""
    if name == AUTO:
        return _chosen(situation)
    obstacles = backend_obstacles(name, situation)
    if obstacles:
        raise BackendError(
            f"experts_implementation={name!r} cannot run here",
            faults=[Fault(name, "cannot run", obstacle) for obstacle in obstacles],
            advice=f'take "{AUTO}"' + (', or dtype="bfloat16", which decodes the weights' if situation.forms else ""),
        )
    return Choice(name, "it was named")


@functools.cache
def _chosen(situation: Situation) -> Choice:
    """`select_backend`, logged the first time that a situation is met."""
    choice = select_backend(situation)
    logger.info("experts: %s, %s", *choice)
    return choice
