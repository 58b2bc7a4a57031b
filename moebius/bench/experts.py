"""`moebius bench experts`: one layer of routed experts, by every backend and every installed peer, in one run.

T tokens, K experts a token, E experts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moebius.bench.experts_cases import Weights, shape_of
from moebius.bench.experts_clocks import clock_of, measured_peaks, one_thread, reason_of
from moebius.bench.experts_compiling import in_parallel
from moebius.bench.experts_points import make_point, measured, run_once
from moebius.bench.experts_tiles import tuned, write_table
from moebius.bench.experts_ways import FORWARD, TRAINING, Way, chosen_ways, known_ways
from moebius.bench.load import machine
from moebius.errors import ArgumentError

DEVICES = {
    "cuda": (("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3/16"), (1, 8, 64, 512, 4096, 16384)),
    "cpu": (("qwen3-30b-a3b",), (1, 8, 64, 512, 2048)),
}
"""The shapes and the tokens that are measured unless others are asked for."""
TRAINED_TOKENS = 512
COMPILE_SECONDS = 25.0


@dataclass(frozen=True)
class Request:
    """What to measure.  shapes, tokens, ways: none means the device's own choice.  training: forward and backward too,
    from TRAINED_TOKENS on unless tokens were given.  forms: quantized ones, which ours then run beside plain weights.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    shapes: Sequence[str] = ()
    tokens: Sequence[int] = ()
    ways: Sequence[str] = ()
    forms: Sequence[str] = ()
    training: bool = False
    rounds: int = 5

    def all_shapes(self) -> Sequence[str]:
        return self.shapes or DEVICES[self.device][0]

    def points(self) -> list[tuple[int, str]]:
        """(tokens, passes)."""
        tokens = self.tokens or DEVICES[self.device][1]
        trained = [count for count in tokens if self.tokens or count >= TRAINED_TOKENS] if self.training else []
        return [*((count, FORWARD) for count in tokens), *((count, TRAINING) for count in trained)]


def run(request: Request, say: Callable[[str], None], command: str = "") -> dict[str, Any]:
    """The report as plain data.  ArgumentError: a device that is not known or not here, an unknown shape, way, form."""
    _check(request)
    ways, begin = chosen_ways(request.ways, request.forms, request.device), time.perf_counter()
    notes = compiled(request, ways)
    say(f"kernels compiled in {time.perf_counter() - begin:.0f} s")
    rows: list[dict[str, Any]] = []
    with one_thread() if request.device == "cpu" else nullcontext():
        peaks = measured_peaks(request.device, getattr(torch, request.dtype))
        for where, found in _measurements(request, ways, peaks):
            rows += found if isinstance(found, list) else []
            notes += [f"{where}: {found}"] if isinstance(found, str) else []
            say(f"{where}: {time.perf_counter() - begin:.0f} s so far")
    seconds = round(time.perf_counter() - begin, 1)
    return {**_head(request, command), "seconds": seconds, "peaks": peaks, "notes": notes, "rows": rows}


def _check(request: Request) -> None:
    if request.device not in DEVICES:
        raise ArgumentError(f"device: {request.device!r}; known: {', '.join(DEVICES)}")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device: 'cuda', but torch finds no GPU here", advice='take device="cpu"')
    for name in request.all_shapes():
        shape_of(name)


def _measurements(
    request: Request, ways: Sequence[Way], peaks: dict[str, float]
) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """Of each point: where it is, and its rows or, where the device failed, why there are none."""
    clock = clock_of(request.device)
    for name in request.all_shapes():
        weights = Weights(shape_of(name), request.device, getattr(torch, request.dtype))
        for tokens, passes in request.points():
            where = f"{name}, {tokens} tokens, {passes}"
            try:
                found = measured(make_point(weights, tokens, passes), ways, clock, request.rounds, peaks)
                yield where, [_rounded({"shape": name, **row}) for row in found]
            except RuntimeError as error:
                yield where, reason_of(error)


def run_model(request: Request, command: str = "") -> dict[str, Any]:
    """The prefill of a whole model, see `experts_model.prefill`."""
    from moebius.bench.experts_model import prefill

    _check(request)
    found = prefill(request.device, getattr(torch, request.dtype), request.rounds)
    return {**_head(request, command), "model": found, "notes": [], "rows": []}


def tune(request: Request, path: Path, say: Callable[[str], None]) -> None:
    """Writes a table of tiles, see `experts_tiles.tuned`.  ArgumentError: there is no GPU to try them on."""
    if request.device != "cuda":
        raise ArgumentError(f"tiles of the fused kernels are tried on a GPU; device: {request.device!r}")
    _check(request)
    write_table(tuned(request.all_shapes(), request.tokens, getattr(torch, request.dtype), say), path)


def _head(request: Request, command: str) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": {**machine(request.device), **_versions()},
        "device": request.device,
        "dtype": request.dtype,
    }


def compiled(request: Request, ways: Sequence[Way], limit: float = COMPILE_SECONDS) -> list[str]:
    """Compiles, in parallel, what the ways will need; what did not work out, which is no reason to stop."""
    if request.device != "cuda":
        return []
    jobs = [
        (request.forms, way.name, shape, request.dtype, tokens, passes)
        for way in ways
        if way.kernels
        for shape in request.all_shapes()
        for tokens, passes in request.points()
        if not (way.form and passes == TRAINING)
    ]
    outcomes = zip(jobs, in_parallel(_compile, jobs, limit), strict=True)
    return [f"{way}, {shape}, {tokens} tokens: {why}" for (_, way, shape, _, tokens, _), why in outcomes if why]


def _compile(job: tuple[Sequence[str], str, str, str, int, str]) -> None:
    forms, name, shape, dtype, tokens, passes = job
    weights = Weights(shape_of(shape), "cuda", getattr(torch, dtype))
    run_once(make_point(weights, tokens, passes), known_ways(forms)[name])
    torch.cuda.synchronize()
    del weights
    torch.cuda.empty_cache()  # the other processes need it


def _versions() -> dict[str, str]:
    packages = {"triton": "triton", "liger_kernel": "liger-kernel"}
    return {package: version(package) for module, package in packages.items() if find_spec(module)}


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def table(report: dict[str, Any]) -> str:
    """What was measured, for people: a block for each shape, number of tokens and passes."""
    if "model" in report:
        from moebius.bench.experts_model import sentence

        return sentence(report["model"])
    peaks = report["peaks"]
    rates = f"{peaks['copied_bytes_a_second'] / 1e12:.3g} TB/s copied, {peaks['flop_a_second'] / 1e12:.3g} TFLOP/s"
    lines = [
        f"{report['dtype']} on {report['device']}, {rates}; medians; rates: the better of plain calls and a CUDA graph"
    ]
    heading = None
    for row in report["rows"]:
        if (row["shape"], row["tokens"], row["passes"]) != heading:
            heading = row["shape"], row["tokens"], row["passes"]
            columns = f"{'ms':>9} {'graph':>9} {'TFLOP/s':>8} {'TB/s':>7} {'floor':>6} {'GB':>7}"
            lines += ["", f"{row['shape']}  T={row['tokens']}  {row['passes']}", f"  {'':<24} {columns}"]
        lines.append(f"  {row['way']:<24} {_figures(row)}")
    return "\n".join([*lines, *report["notes"]])


def _figures(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"- {row['reason']}"
    graph = f"{row['graph_ms']:>9.4g}" if row["graph_ms"] else f"{'':>9}"
    rates = f"{row['teraflop_a_second']:>8.4g} {row['terabytes_a_second']:>7.3g}"
    return f"{row['ms']:>9.4g} {graph} {rates} {row['share_of_floor']:>6.0%} {row['peak_bytes'] / 1e9:>7.3g}"
