"""The ways to run a layer of experts that are compared: our backends, and the peers that are installed.

T tokens, K experts a token, E experts, S = T*K rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from moebius.bench.experts_cases import FORMS, Weights
from moebius.errors import ArgumentError
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, AUTO

FORWARD, TRAINING = "forward", "forward+backward"
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")  # its others are fetched from a hub when they first run
DECODED_TOKENS = 64
LONG_LOOP = {"cuda": 512, "cpu": 2048}  # tokens from which one expert at a time is not worth its time
COPIED_BYTES = {"cuda": 8e9, "cpu": 1e9}


@dataclass(frozen=True)
class Way:
    """make: the layer over given weights: (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H].

    form: which they are held in.  kernels: it compiles when it first runs.
    """

    name: str
    make: Callable[[Weights], nn.Module]
    form: str | None = None
    kernels: bool = False

    def hopeless(self, weights: Weights, tokens: int, passes: str) -> str | None:
        """Why it is not tried, if it is not: what is known to take too long or too much."""
        shape, device, backend = weights.shape, weights.device, self.name.split()[1:2]
        if self.form and passes == TRAINING:
            return "weights in quantized forms have no gradient"
        if self.form and backend == ["eager"] and tokens > DECODED_TOKENS:
            return "it decodes every expert at each call"
        copied = tokens * shape.top_k * weights.expert_bytes()
        if backend == ["batched_mm"] and copied * (2 if passes == TRAINING else 1) > COPIED_BYTES[device]:
            return f"it would copy {copied / 1e9:.1f} GB of weights"
        if self.name == "transformers eager" and passes == TRAINING:
            return "it writes a gradient as large as all weights for each expert"
        if backend == ["eager"] and shape.num_experts > 8 and tokens > LONG_LOOP[device]:
            return f"one expert at a time, {shape.num_experts} experts"
        return None


def known_ways(forms: Iterable[str] = ()) -> dict[str, Way]:
    """By name: all that could run here, with weights as they are; ours also with weights held in these forms."""
    backends = [AUTO, *ALL_EXPERTS_FUNCTIONS]
    ours = [_own(backend, None) for backend in backends]
    ours += [
        _own(backend, form) for form in forms for backend in backends if backend not in ("batched_mm", "grouped_mm")
    ]
    peers = [_of_transformers(name) for name in TRANSFORMERS] if find_spec("transformers") else []
    liger = [Way("liger", _liger, kernels=True)] if find_spec("liger_kernel") else []
    return {way.name: way for way in (*ours, *peers, *liger)}


def chosen_ways(names: Sequence[str], forms: Sequence[str], device: str) -> list[Way]:
    """names: those alone; none: all but "auto", which is one of the others, and but what runs on other devices.

    ArgumentError: an unknown way or form.
    """
    if strange := [form for form in forms if form not in FORMS]:
        raise ArgumentError(f"forms of weights: {strange[0]!r}; known: {', '.join(FORMS)}")
    known: Mapping[str, Way] = known_ways(forms)
    if unknown := [name for name in names if name not in known]:
        raise ArgumentError(f"ways to run experts: {unknown[0]!r}; known: {', '.join(known)}")
    elsewhere = {"cpu": "fused", "cuda": "cpu"}[device]
    default = [name for name in known if name.split()[1:2] not in ([AUTO], [elsewhere])]
    return [known[name] for name in names or default]


def _own(backend: str, form: str | None) -> Way:
    return Way(
        " ".join(filter(None, ("moebius", backend, form))),
        lambda weights: weights.experts(backend, form),
        form,
        kernels=backend in (AUTO, "fused"),
    )


def _of_transformers(name: str) -> Way:
    def make(weights: Weights) -> nn.Module:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = _config(weights)
        config._experts_implementation = name
        return _over(Qwen3MoeExperts, config, weights)

    return Way(f"transformers {name}", make)


def _liger(weights: Weights) -> nn.Module:
    from liger_kernel.transformers.swiglu import LigerExperts  # type: ignore[import-not-found]  # optional

    return _over(LigerExperts, _config(weights), weights)


def _config(weights: Weights) -> Any:
    from transformers import Qwen3MoeConfig

    hidden_size, intermediate_size, num_experts, top_k = weights.shape
    return Qwen3MoeConfig(
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )


def _over(layer_class: Any, config: Any, weights: Weights) -> nn.Module:
    """A peer's module, whose parameters are the same tensors as ours."""
    with torch.device("meta"):
        module = layer_class(config)
    for name, parameter in weights.plain.items():
        module.register_parameter(name, parameter)
    return module
