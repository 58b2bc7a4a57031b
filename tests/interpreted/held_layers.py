"""Layers of experts held in quantized forms, and what goes into them."""

import torch

from moebius.config import Activation, SoftmaxTopK, SparseMoe, SwiGLU
from moebius.experts.interface import Experts
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import Form

EXPERTS, TOP_K = 6, 2
SEGMENTS = {"gate_up_proj": 2, "down_proj": 1}


def held_layer(
    form: Form | None, hidden: int, width: int, *, activation: Activation | None = None, bias: bool = False
) -> Experts:
    """Both projections in the form; None: plain."""
    config = SparseMoe(EXPERTS, TOP_K, width, SoftmaxTopK(renormalize=True), activation or SwiGLU(), bias=bias)
    experts = Experts(config, hidden).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    for name, segments in SEGMENTS.items() if form else ():
        values, scales = quantize(form, experts.get_parameter(name), segments)
        experts.hold(name, form)
        experts.get_parameter(name).copy_(values)
        experts.get_parameter(f"{name}_scale").copy_(scales)
    return experts


def inputs(tokens: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """States, ids and weights."""
    index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    return torch.randn(tokens, hidden), index, torch.rand(tokens, TOP_K)
