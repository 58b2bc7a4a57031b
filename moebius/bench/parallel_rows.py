"""What the ranks of `moebius bench parallel` found, put together: rows, and a table of them for people."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moebius.bench.parallel_ways import WAYS
from moebius.checkpoint.reading import torch_dtype
from moebius.models import family_of
from moebius.models.counting import count_parameters

Launch = Sequence[Mapping[str, Any]]
"""What each rank of a launch found."""


def way_row(
    name: str, launches: Sequence[Launch], ranks: int, tokens: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A way's row: medians over launches of what the slowest or fullest rank found, as far as all of them came.

    tokens: of each batch, in prefill.  "reason": why something is missing.
    """
    way = WAYS[name]
    row: dict[str, Any] = {"way": name, "ranks": way.size(ranks), "batch": way.batch}
    if loads := _of_all(launches, "load"):
        row["load"] = {**_load(loads), "share_bytes": share_bytes(config, way.size(ranks))}
        row["spelling"] = loads[0][0]["spelling"]
    if found := _of_all(launches, "prefill_seconds"):
        seconds = _median(found, median_of_slowest)
        row["prefill"] = {"seconds": seconds, "tokens_a_second": tokens * way.batches(ranks) / seconds}
    if found := [each for each in _of_all(launches, "comparison") if all(each)]:
        row["comparison"] = max((each for launch in found for each in launch), key=lambda each: each["relative"])
    if found := _of_all(launches, "step_seconds"):
        row["step_seconds"] = _median(found, median_of_slowest)
    if found := _of_all(launches, "captured"):
        row |= _captured(found)
    reasons = [rank["reason"] for launch in launches for rank in _failed_first(launch) if rank["reason"]]
    return row | ({"reason": reasons[0]} if reasons else {})


def _of_all(launches: Sequence[Launch], name: str) -> list[list[Any]]:
    """Of each launch of which every rank has it, every rank's."""
    return [[rank[name] for rank in launch] for launch in launches if all(name in rank for rank in launch)]


def _median(launches: Sequence[Sequence[Any]], of_launch: Callable[[Sequence[Any]], float]) -> float:
    return statistics.median(map(of_launch, launches))


def median_of_slowest(ranks: Sequence[Sequence[float]]) -> float:
    """Of measurements that ranks made together: each takes as long as the slowest rank's, and the median counts."""
    return statistics.median(map(max, zip(*ranks, strict=True)))


def _failed_first(launch: Launch) -> list[Mapping[str, Any]]:
    """Those that say what went wrong before those that were ended for it."""
    return sorted(launch, key=lambda rank: "error" not in rank)


def _load(launches: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    names = ("seconds", "read_bytes", "planned_bytes", "weight_bytes", "allocated_bytes")
    return {name: _median(launches, lambda ranks, name=name: max(rank[name] or 0 for rank in ranks)) for name in names}


def _captured(launches: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    seconds = _median(launches, lambda ranks: median_of_slowest([rank["seconds"] for rank in ranks]))
    return {
        "captured_step_seconds": seconds,
        "captured_differs": max(rank["differs"] for ranks in launches for rank in ranks),
    }


def share_bytes(config: Mapping[str, Any], ranks: int) -> int:
    """What a rank has to hold: everything but the routed experts, and the largest share of these."""
    decoder = family_of(config).from_hf(config)
    counts, experts = count_parameters(decoder), min(layer.num_experts for layer in decoder.moe_layers)
    routed = counts.by_role["routed_experts"]
    parameters = counts.total - routed + routed * math.ceil(experts / ranks) // experts
    return parameters * torch_dtype(decoder.dtype or "float32").itemsize


def exchange_rows(launches: Sequence[Launch]) -> dict[str, Any]:
    """The medians of each exchange and number of tokens, and why something is missing."""
    found = _of_all(launches, "exchanges")
    rows = [_exchange_row([[rank[number] for rank in launch] for launch in found]) for number in range(_count(found))]
    reasons = [rank["reason"] for launch in launches for rank in _failed_first(launch) if rank["reason"]]
    return {"exchanges": rows, **({"exchanges_reason": reasons[0]} if reasons else {})}


def _count(launches: Sequence[Sequence[Any]]) -> int:
    return len(launches[0][0]) if launches else 0


def _exchange_row(launches: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    seconds = _median(launches, lambda ranks: median_of_slowest([rank["seconds"] for rank in ranks]))
    return {**launches[0][0], "seconds": seconds}


# --- for people ------------------------------------------------------------------------------------------------------

COLUMNS = ("tok/s", "ms", "x one", "step ms", "graph ms", "load s", "read GB", "GB", "share GB", "differs")


def table(report: Mapping[str, Any]) -> str:
    """A line for each way, and one for each exchange."""
    decode, one = report["decode"], next((row for row in report["rows"] if row["way"] == "moebius 1"), {})
    head = (
        f"{report['model']['num_hidden_layers']} layers of {report['model']['model_type']}, {report['ranks']} ranks on "
        f"{report['device']}; prefill of {report['tokens']} tokens a batch; decode of {decode['rows']} rows in all, "
        f"{decode['cached']} tokens cached; medians"
    )
    lines = [head, f"{'':<26}" + "".join(f"{name:>10}" for name in COLUMNS)]
    lines += [line for row in report["rows"] for line in _row_lines(row, one)]
    if report["exchanges"]:
        lines += ["", f"{'one exchange, there and back':<34}{'tokens':>8}{'us':>10}  auto takes"]
    lines += [_exchange_line(row) for row in report["exchanges"]]
    return "\n".join([*lines, *([f"exchanges: {report['exchanges_reason']}"] if "exchanges_reason" in report else [])])


def _row_lines(row: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[str]:
    figures = "".join(f"{figure:>10}" for figure in _figures(row, one))
    yield f"{row['way']:<26}{figures}".rstrip()
    yield from (f"  {name}: {row[name]}" for name in ("spelling", "reason") if row.get(name))


def _figures(row: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[str]:
    rate, load = row.get("prefill", {}).get("tokens_a_second"), row.get("load", {})
    peer = one.get("prefill", {}).get("tokens_a_second")
    yield _figure(rate, ",.0f")
    yield _figure(row.get("prefill", {}).get("seconds"), ".4g", 1e3)
    yield _figure(rate / peer if rate and peer else None, ".2f")
    yield _figure(row.get("step_seconds"), ".4g", 1e3)
    yield _figure(row.get("captured_step_seconds"), ".4g", 1e3)
    yield _figure(load.get("seconds"), ".2f")
    yield _figure(load.get("planned_bytes") or None, ".3f", 1e-9)
    yield _figure(load.get("allocated_bytes") or load.get("weight_bytes"), ".3f", 1e-9)
    yield _figure(load.get("share_bytes"), ".3f", 1e-9)
    yield _figure(row.get("comparison", {}).get("relative"), ".2g")


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:{form}}"


def _exchange_line(row: Mapping[str, Any]) -> str:
    return f"{row['batch'] + ', ' + row['exchange']:<34}{row['tokens']:>8}{row['seconds'] * 1e6:>10.4g}  {row['auto']}"
