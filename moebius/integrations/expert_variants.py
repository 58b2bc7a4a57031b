"""What kind of experts a transformers module holds, and which of them are ours.

E experts, H hidden, I intermediate.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moebius.config import Activation, ClampedSwiGLU, SwiGLU
from moebius.experts.activations import gated_activation
from moebius.quantization.forms import BlockFp8

# Where gates with a limit keep it: (alpha, limit).
CLAMP_ATTRIBUTES = (("alpha", "limit"), ("swiglu_alpha", "swiglu_limit"))
# Far beyond any limit, about the usual ones, and small.
PROBED = (-1e4, -20.0, -7.5, -7.0, -3.0, -1.0, -0.3, 0.0, 0.4, 1.0, 2.5, 6.9, 7.1, 12.0, 30.0, 1e4)


@dataclass(frozen=True)
class Variant:
    """What transformers' decorator says of an experts class, and what its gate computes.

    activation: None where it is none of ours.  form: of fp8 experts; their faults are in form_obstacles.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    activation: Activation | None
    form: BlockFp8 | None
    form_obstacles: tuple[str, ...] = ()

    @property
    def obstacles(self) -> list[str]:
        """Why such experts are not ours; none if they are."""
        gate = self.has_gate and self.is_concatenated and self.activation is None
        found = {
            "no gate (has_gate=False)": not self.has_gate,
            "gate and up rows interleaved (is_concatenated=False)": self.has_gate and not self.is_concatenated,
            "a norm of each expert's output (has_post_expert_norm=True)": self.has_post_expert_norm,
            "a gate (_apply_gate) that is neither SwiGLU nor ClampedSwiGLU": gate,
        }
        return [obstacle for obstacle, stands in found.items() if stands] + list(self.form_obstacles)


def variant_of(module: nn.Module) -> Variant:
    """Reads a module of a class that transformers' `use_experts_implementation` decorates."""
    facts = vars(module)
    concatenated = facts["has_gate"] and facts["is_concatenated"]
    quantized = "down_proj_scale_inv" in dict(module.named_parameters())
    return Variant(
        has_gate=facts["has_gate"],
        has_bias=facts["has_bias"],
        is_transposed=facts["is_transposed"],
        is_concatenated=facts["is_concatenated"],
        has_post_expert_norm=facts.get("has_post_expert_norm", False),  # since transformers 5.23
        activation=_activation(module, facts) if concatenated else None,
        form=_fp8_form(module, facts) if quantized else None,
        form_obstacles=_fp8_obstacles(module, facts) if quantized else (),
    )


def _activation(module: Any, facts: Mapping[str, Any]) -> Activation | None:
    """The activation of ours that gives the numbers that the module's own gate gives; None if there is none.

    Told by numbers, because models override `_apply_gate` freely, and name alike what differs.
    """
    clamped = [
        ClampedSwiGLU(float(facts[alpha]), float(facts[limit]))
        for alpha, limit in CLAMP_ATTRIBUTES
        if isinstance(facts.get(alpha), int | float) and isinstance(facts.get(limit), int | float)
    ]
    pairs = torch.tensor(list(itertools.product(PROBED, PROBED)), device="cpu")  # of one gate and one up
    gate, up = pairs[:, :1].view(-1, 2), pairs[:, 1:].view(-1, 2)  # two of each, to see their layout
    try:
        with torch.no_grad():
            found = module._apply_gate(torch.cat((gate, up), dim=-1))
    except RuntimeError:  # a gate with weights of its own, on another device
        return None
    candidates = (SwiGLU(), *clamped)
    return next((each for each in candidates if _gives(each, gate, up, found)), None)


def _gives(activation: Activation, gate: torch.Tensor, up: torch.Tensor, found: torch.Tensor) -> bool:
    expected = gated_activation(activation, gate, up)
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-5)


def _fp8_form(module: Any, facts: Mapping[str, Any]) -> BlockFp8:
    block = facts["block_size"] or module.down_proj.shape[1:]
    return BlockFp8((int(block[0]), int(block[1])), str(module.down_proj_scale_inv.dtype).removeprefix("torch."))


def _fp8_obstacles(module: Any, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What of transformers' fp8 experts we have no form for."""
    found = {
        f"weights in {module.down_proj.dtype} (expert_dtype: fp8 alone)": module.down_proj.dtype != torch.float8_e4m3fn,
        "a scale a tensor (block_size=None)": facts["block_size"] is None,
        "activation_scheme='static'": facts["activation_scheme"] == "static",
    }
    return tuple(obstacle for obstacle, stands in found.items() if stands)
