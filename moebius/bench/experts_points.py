"""One point of the experts' suite: every way on the same inputs, in turns.  A way that fails is a row with its reason.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebius.bench.experts_cases import Inputs, Weights, distinct_experts, make_inputs
from moebius.bench.experts_clocks import Call, Clock, reason_of
from moebius.bench.experts_ways import FORWARD, TRAINING, Way

CAPTURED_TOKENS = 4096
CHECKED_TOKENS = 32
LARGEST_ERROR = 0.02  # bfloat16 gives 0.005
SHORT = 0.003  # seconds


@dataclass(frozen=True)
class Point:
    """passes: FORWARD, or TRAINING for forward and backward, with the gradients of states and all weights.

    inputs: calls take them in turn, so that few tokens do not find their experts in the processor's cache.
    """

    weights: Weights
    tokens: int
    passes: str
    inputs: Sequence[Inputs]
    _expected: dict[str | None, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def error(self, output: Tensor, form: str | None) -> float:
        """How far the output [T, H] for the first inputs is from that of "eager", relative; on some of the tokens."""
        places = torch.linspace(0, self.tokens - 1, min(self.tokens, CHECKED_TOKENS), device=output.device).long()
        if form not in self._expected:
            given = (tensor[places] for tensor in self.inputs[0])
            self._expected[form] = self.weights.experts("eager", form)(*given).float()
        expected = self._expected[form]
        return ((output[places].float() - expected).norm() / expected.norm()).item()

    def floor_seconds(self, peaks: dict[str, float], form: str | None) -> float:
        """The least time: the chosen experts read once, or the products at full rate; a training step three times
        that (gradients of the inputs and of the weights are a product each).
        """
        reading = self.read_bytes(form) / max(peaks["copied_bytes_a_second"], peaks["read_bytes_a_second"])
        once = max(reading, self.weights.shape.flop(self.tokens) / peaks["flop_a_second"])
        return 3 * once if self.passes == TRAINING else once

    def read_bytes(self, form: str | None) -> float:
        return distinct_experts(self.inputs) * self.weights.expert_bytes(form)

    @property
    def flop(self) -> int:
        return self.weights.shape.flop(self.tokens) * (3 if self.passes == TRAINING else 1)


def make_point(weights: Weights, tokens: int, passes: str) -> Point:
    variants = 8 if tokens <= 64 else 4 if tokens <= CAPTURED_TOKENS else 1
    made = [make_inputs(weights.shape, tokens, weights.device, weights.dtype, seed) for seed in range(variants)]
    return Point(weights, tokens, passes, made)


@dataclass
class Runner:
    """A way that is ready for its turns.  call: `each` calls of the layer, one after the other."""

    way: Way
    call: Call
    each: int
    times: int
    peak_bytes: int
    error: float
    graph: Call | None
    no_graph: str
    seconds: list[float] = field(default_factory=list)
    graph_seconds: list[float] = field(default_factory=list)

    def turn(self, clock: Clock) -> None:
        self.seconds.append(clock.seconds(self.call, self.times) / self.each)
        if self.graph:
            self.graph_seconds.append(clock.seconds(self.graph, self.times) / self.each)


def measured(point: Point, ways: Sequence[Way], clock: Clock, rounds: int, peaks: dict[str, float]) -> list[Any]:
    """A row for each way, as plain data: its figures, or `reason`."""
    ready = {way.name: _ready(point, way, clock) for way in ways}
    runners = [runner for runner in ready.values() if isinstance(runner, Runner)]
    for _ in range(rounds):
        for runner in runners:
            runner.turn(clock)
    head = {"tokens": point.tokens, "passes": point.passes}
    return [
        {
            **head,
            "way": name,
            **(figures_of(point, runner, peaks) if isinstance(runner, Runner) else {"reason": runner}),
        }
        for name, runner in ready.items()
    ]


def run_once(point: Point, way: Way) -> None:
    """Compiles what the way needs here."""
    _call(way.make(point.weights), point.passes, point.inputs[0])()


def _ready(point: Point, way: Way, clock: Clock) -> Runner | str:
    reason = way.hopeless(point.weights, point.tokens, point.passes)
    if reason:
        return reason
    try:
        return _tried(point, way, clock)
    except Exception as error:  # noqa: BLE001 - peers raise what they like; the others go on
        return reason_of(error)


def _tried(point: Point, way: Way, clock: Clock) -> Runner | str:
    layer = way.make(point.weights)
    first = _call(layer, point.passes, point.inputs[0])
    output, peak = clock.peak_bytes(first)
    error = point.error(output, way.form)
    if not error <= LARGEST_ERROR:
        return f"a wrong answer: {error:.2g} away"
    del output
    once = clock.seconds(first, 1)
    if once > clock.limit:
        return f"too slow: {once:.3g} s"
    inputs = point.inputs if once < SHORT else point.inputs[:1]
    call = _all([_call(layer, point.passes, given) for given in inputs])
    small = point.passes == FORWARD and point.tokens <= CAPTURED_TOKENS
    graph, no_graph = clock.captured(call) if small else (None, f"not tried over {CAPTURED_TOKENS} tokens")
    times = max(1, min(100, int(clock.turn / max(once * len(inputs), 1e-6))))
    return Runner(way, call, len(inputs), times, peak, error, graph, no_graph)


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _call(layer: nn.Module, passes: str, given: Inputs) -> Callable[[], Tensor]:
    """What is timed; gives the output."""
    if passes == FORWARD:

        @torch.no_grad()
        def forward() -> Tensor:
            return layer(*given)

        return forward
    return _training_call(layer, given)


def _training_call(layer: nn.Module, given: Inputs) -> Callable[[], Tensor]:
    states, slot_weights = (tensor.detach().requires_grad_() for tensor in (given.hidden_states, given.top_k_weights))
    grad = torch.ones_like(states)
    leaves = [states, slot_weights, *layer.parameters()]

    def step() -> Tensor:
        output = layer(states, given.top_k_index, slot_weights)
        torch.autograd.grad(output, leaves, grad)
        return output.detach()

    return step


def figures_of(point: Point, runner: Runner, peaks: dict[str, float]) -> dict[str, Any]:
    """Medians; rates by the better of plain calls and a CUDA graph."""
    plain = statistics.median(runner.seconds)
    graph = statistics.median(runner.graph_seconds) if runner.graph_seconds else None
    best, floor = min(plain, graph or plain), point.floor_seconds(peaks, runner.way.form)
    return {
        "ms": plain * 1e3,
        "graph_ms": graph and graph * 1e3,
        "no_graph": runner.no_graph,
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / best,
        "teraflop_a_second": point.flop / best / 1e12,
        "terabytes_a_second": point.read_bytes(runner.way.form) / best / 1e12,
        "flop_a_byte": point.flop / point.read_bytes(runner.way.form),
        "peak_bytes": runner.peak_bytes,
        "error": runner.error,
    }
