"""`moebius bench experts --tune`: tries tiles for the fused forward on this GPU, and writes them as a table.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows, sorted by expert.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.bench.experts_cases import Inputs, Shape, Weights, make_inputs, shape_of
from moebius.bench.experts_clocks import CudaClock, reason_of
from moebius.bench.experts_compiling import in_parallel
from moebius.config import SwiGLU
from moebius.experts.activations import gated_activation
from moebius.experts.fused.tuning import ForwardTiles, TileConfig

TOKENS = (8, 64, 512, 4096, 16384)
GATE_UP, DOWN = "gate_up", "down"
LARGEST_ERROR = 0.01
COMPILE_SECONDS = 60.0
FEW_ROWS = 64  # a tile of so many rows or fewer may have the weights as the tall side
CALLS = 5

Product = Callable[[TileConfig], Tensor]


class Timed(NamedTuple):
    seconds: float
    config: TileConfig


def heights(rows_per_expert: float) -> tuple[int, ...]:
    """The rows of a tile that are worth a try."""
    steps = {6: (16,), 12: (16, 32), 48: (32, 64), 300: (64, 128)}
    return next((found for most, found in steps.items() if rows_per_expert <= most), (128,))


def candidates(product: str, block_m: int) -> list[TileConfig]:
    """Tiles of one product that are worth a try: of about 200 that were measured on an H200, those near the best."""
    if block_m > FEW_ROWS:
        return _tall_gate_up(block_m) if product == GATE_UP else _tall_down(block_m)
    steps = [(64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 5), (128, 64, 4, 3), (128, 128, 4, 3)]
    found = [TileConfig(block_m, *step, swapped=True) for step in steps]
    if block_m == FEW_ROWS:
        plain = [(64, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4)]
        found += [TileConfig(block_m, *step) for step in plain]
    if block_m == FEW_ROWS and product == DOWN:
        found += [TileConfig(block_m, 256, 64, 4, 3), TileConfig(block_m, 256, 64, 4, 3, schedule="flat")]
    return found


def _tall_gate_up(block_m: int) -> list[TileConfig]:
    plain = [TileConfig(block_m, 128, 64, 8, stages) for stages in (3, 4)]
    grouped = [TileConfig(block_m, 128, 64, 8, 3, group_m=group_m) for group_m in (8, 32)]
    return [*plain, *grouped, TileConfig(block_m, 64, 64, 4, 3), TileConfig(block_m, 128, 32, 8, 4)]


def _tall_down(block_m: int) -> list[TileConfig]:
    wide = [TileConfig(block_m, 256, 64, 8, stages) for stages in (3, 4)]
    flat = [TileConfig(block_m, 256, 64, 8, stages, schedule="flat") for stages in (3, 4)]
    narrow = [TileConfig(block_m, 128, 64, 4, stages) for stages in (3, 4)]
    busy = TileConfig(block_m, 128, 64, 4, 3, schedule="flat", programs=2)
    return [*wide, *flat, *narrow, busy]


def tuned(shapes: Sequence[str], tokens: Sequence[int], dtype: torch.dtype, say: Callable[[str], None]) -> list[Any]:
    """The entries of a table in the format of experts/fused/tables: for each shape and number of tokens (none: TOKENS)
    the fastest tiles that gave the right numbers.
    """
    counts = tokens or TOKENS
    jobs = [(shape_of(name), dtype, *each) for name in shapes for each in _jobs(shape_of(name), counts)]
    jobs = list(dict.fromkeys(jobs))
    outcomes = in_parallel(_compile, jobs, COMPILE_SECONDS)
    broken = {job: why for job, why in zip(jobs, outcomes, strict=True) if why}
    for (_, _, product, config), why in broken.items():
        say(f"{product} {spelled(config)}: {why}")
    entries = []
    for name in shapes:
        weights = Weights(shape_of(name), "cuda", dtype)
        for count in counts:
            entries += _entry(weights, count, {(job[2], job[3]) for job in broken if job[0] == weights.shape}, say)
    return entries


def write_table(entries: Iterable[Any], path: Path) -> None:
    """One entry a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


def entry_of(shape: Shape, tokens: int, tiles: ForwardTiles) -> dict[str, Any]:
    """What `tuning.tiles_of` reads."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "rows_per_expert": tokens * shape.top_k / shape.num_experts,
        "block_m": tiles.block_m,
        GATE_UP: _differing(tiles.gate_up),
        DOWN: _differing(tiles.down),
    }


def spelled(config: TileConfig) -> str:
    options = {name: value for name, value in _differing(config).items() if name not in ("block_n", "block_k")}
    words = " ".join(f"{name}={value}" for name, value in options.items())
    return f"{config.block_m}x{config.block_n}x{config.block_k} {words}"


def _differing(config: TileConfig) -> dict[str, Any]:
    """Its fields but the height, and but what is the default."""
    defaults = {field.name: field.default for field in fields(TileConfig)}
    return {name: value for name, value in asdict(config).items() if name != "block_m" and value != defaults[name]}


def _jobs(shape: Shape, tokens: Sequence[int]) -> list[tuple[str, TileConfig]]:
    return [
        (product, config)
        for count in tokens
        for block_m in heights(count * shape.top_k / shape.num_experts)
        for product in (GATE_UP, DOWN)
        for config in candidates(product, block_m)
    ]


def _compile(job: tuple[Shape, torch.dtype, str, TileConfig]) -> None:
    """By a problem of two experts and two tokens: kernels know H, I and K alone."""
    shape, dtype, product, config = job
    small = shape._replace(num_experts=max(2, shape.top_k))
    weights = Weights(small, "cuda", dtype)
    _Problem(weights, make_inputs(small, 2, "cuda", dtype, 0), config.block_m).products()[product](config)
    torch.cuda.synchronize()


def _entry(weights: Weights, tokens: int, broken: set[Any], say: Callable[[str], None]) -> list[Any]:
    """One entry, or none if nothing worked; both products have to work on tiles of one height."""
    shape, inputs = weights.shape, make_inputs(weights.shape, tokens, weights.device, weights.dtype, tokens)
    whole = []
    for block_m in heights(tokens * shape.top_k / shape.num_experts):
        problem = _Problem(weights, inputs, block_m)
        best = [_fastest(problem, product, broken, say) for product in (GATE_UP, DOWN)]
        if all(best):
            whole.append([each for each in best if each])
    if not whole:
        return []
    gate_up, down = min(whole, key=lambda pair: sum(each.seconds for each in pair))
    times = f"{gate_up.seconds * 1e6:.0f} + {down.seconds * 1e6:.0f} us"
    say(f"{shape}, {tokens} tokens: {times}: {spelled(gate_up.config)}, {spelled(down.config)}")
    return [entry_of(shape, tokens, ForwardTiles(gate_up.config, down.config))]


def _fastest(problem: "_Problem", product: str, broken: set[Any], say: Callable[[str], None]) -> Timed | None:
    found = []
    for config in candidates(product, problem.block_m):
        if (product, config) in broken:
            continue
        try:
            found.append(Timed(problem.seconds(product, config), config))
        except Exception as error:  # noqa: BLE001 - tiles that the compiler or the card refuses; the others go on
            say(f"{product} {spelled(config)}: {reason_of(error)}")
    return min(found, key=lambda timed: timed.seconds, default=None)


class _Problem:
    """Both products on one routing, and what they should give."""

    def __init__(self, weights: Weights, inputs: Inputs, block_m: int):
        from moebius.experts.fused.routing import route

        self.block_m = block_m
        self._states, self._weights = inputs.hidden_states, weights.plain
        self._routing = route(inputs.top_k_index, weights.shape.num_experts, block_m)
        self._expected = _by_grouped_mm(weights, inputs, self._routing)

    def products(self) -> dict[str, Product]:
        from moebius.experts.fused.forward import down, gate_up

        first, second = self._weights["gate_up_proj"].detach(), self._weights["down_proj"].detach()
        states, routing, a = self._states, self._routing, self._expected[GATE_UP]
        return {
            GATE_UP: lambda config: gate_up(states, first, None, routing, config, SwiGLU())[0],
            DOWN: lambda config: down(a, second, None, routing, config),
        }

    def seconds(self, product: str, config: TileConfig) -> float:
        """The best of three.  ValueError: the numbers are wrong."""
        run, expected, clock = self.products()[product], self._expected[product].float(), CudaClock()
        error = ((run(config).float() - expected).norm() / expected.norm()).item()
        if not error < LARGEST_ERROR:
            raise ValueError(f"wrong by {error:.2g}")
        graph, why = clock.captured(lambda: [run(config) for _ in range(CALLS)])
        if graph is None:
            raise ValueError(why)
        return min(clock.seconds(graph, 2) for _ in range(3)) / CALLS


def _by_grouped_mm(weights: Weights, inputs: Inputs, routing: Any) -> dict[str, Tensor]:
    """a [S, I] and y [S, H], in the sorted order; every slot has an expert here."""
    ends, tokens = routing.offsets[1:].contiguous(), routing.order.long() // routing.top_k
    first, second = (weights.plain[name].detach().mT for name in ("gate_up_proj", "down_proj"))
    z = torch.nn.functional.grouped_mm(inputs.hidden_states[tokens], first, offs=ends)
    a = gated_activation(SwiGLU(), *z.chunk(2, dim=-1))
    return {GATE_UP: a, DOWN: torch.nn.functional.grouped_mm(a, second, offs=ends)}
