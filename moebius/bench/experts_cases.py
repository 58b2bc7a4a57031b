"""What the experts' suite runs on: shapes of published layers, one layer's weights, and inputs with uniform routing.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moebius.config import SoftmaxTopK, SparseMoe
from moebius.errors import ArgumentError
from moebius.experts.contract import SEGMENTS
from moebius.experts.interface import Experts
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

FORMS: dict[str, Form] = {"int8": Int8(), "int4": PackedInt4(), "fp8": BlockFp8(), "mxfp4": Mxfp4()}


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def weights(self) -> int:
        """Of one expert: 3 H I."""
        return 3 * self.hidden_size * self.intermediate_size

    def flop(self, tokens: int) -> int:
        """Of a forward; with the backward three times as many."""
        return 2 * tokens * self.top_k * self.weights


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "deepseek-v3/16": Shape(7168, 2048, 64, 8),  # 64 of its 256 experts, and as many of them a token
    "gpt-oss-20b": Shape(2880, 2880, 32, 4),  # its sizes, with a plain SwiGLU
}


def shape_of(name: str) -> Shape:
    """A name in SHAPES, or "H,I,E,K".  ArgumentError: neither."""
    if name in SHAPES:
        return SHAPES[name]
    numbers = name.split(",")
    if len(numbers) == len(Shape._fields) and all(number.isdigit() and int(number) for number in numbers):
        return Shape(*map(int, numbers))
    raise ArgumentError(f"shape: {name!r}; known: {', '.join(SHAPES)}, or four numbers H,I,E,K")


class Inputs(NamedTuple):
    hidden_states: Tensor  # [T, H]
    top_k_index: Tensor  # [T, K] int64
    top_k_weights: Tensor  # [T, K], in the states' dtype


def make_inputs(shape: Shape, tokens: int, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Random states; each token's K experts are drawn uniformly, without repetition."""
    generator = torch.Generator(device).manual_seed(seed)
    states = torch.randn(tokens, shape.hidden_size, device=device, generator=generator)
    scores, index = torch.rand(tokens, shape.num_experts, device=device, generator=generator).topk(shape.top_k)
    return Inputs(states.to(dtype), index, (scores / scores.sum(dim=-1, keepdim=True)).to(dtype))


def distinct_experts(inputs: Sequence[Inputs]) -> float:
    """How many experts a call reads: the mean over the inputs."""
    return sum(given.top_k_index.unique().numel() for given in inputs) / len(inputs)


class Weights:
    """One layer's weights, which every way runs; quantized forms are made when first asked for."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
        generator = torch.Generator(device).manual_seed(0)
        sizes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
        self.plain = {
            name: nn.Parameter(
                torch.empty(size, device=device, dtype=dtype).normal_(std=size[-1] ** -0.5, generator=generator)
            )
            for name, size in sizes.items()
        }
        self._held: dict[str, dict[str, nn.Parameter]] = {}

    def experts(self, implementation: str, form: str | None = None) -> Experts:
        """A layer of ours over these weights, as they are or in a form of FORMS."""
        shape = self.shape
        config = SparseMoe(shape.num_experts, shape.top_k, shape.intermediate_size, SoftmaxTopK(renormalize=True))
        with torch.device("meta"):
            experts = Experts(config, shape.hidden_size, experts_implementation=implementation)
        for name in SEGMENTS if form else ():
            experts.hold(name, FORMS[form or ""])
        for name, parameter in self._parameters(form).items():
            experts.register_parameter(name, parameter)
        return experts

    def expert_bytes(self, form: str | None = None) -> float:
        """Of one expert, scales included."""
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in self._parameters(form).values())
        return nbytes / self.shape.num_experts

    def _parameters(self, form: str | None) -> dict[str, nn.Parameter]:
        if form is None:
            return self.plain
        if form not in self._held:
            self._held[form] = _held(self.plain, FORMS[form])
        return self._held[form]


def _held(plain: dict[str, nn.Parameter], form: Form) -> dict[str, nn.Parameter]:
    """Expert by expert: quantizing takes three times a weight in float32."""
    held = {}
    for name, segments in SEGMENTS.items():
        pieces = [quantize(form, weight, segments) for weight in plain[name].detach()]
        for suffix, parts in zip(("", "_scale"), zip(*pieces, strict=True), strict=True):
            held[name + suffix] = nn.Parameter(torch.stack(parts), requires_grad=False)
    return held
