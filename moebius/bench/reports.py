"""Reports as files: JSON, and a picture beside it."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def write_report(report: dict[str, Any], path: Path, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """path.json with everything; path.png as `draw` draws it, if matplotlib is installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    if find_spec("matplotlib"):
        draw(report, path.with_suffix(".png"))


def draw_speeds(report: dict[str, Any], path: Path) -> None:
    """Of `moebius bench load`: a bar of gigabytes a second for each way."""
    from matplotlib.figure import Figure

    ways = report["ways"]
    figure = Figure(figsize=(7, 0.55 * len(ways) + 1.4), layout="constrained")
    axes = figure.subplots()
    speeds = [way["gigabytes_a_second"] for way in ways.values()]
    colors = ["tab:blue" if name.startswith("moebius") else "tab:gray" for name in ways]
    bars = axes.barh(list(ways), speeds, color=colors)
    axes.bar_label(
        bars, [f"{way['gigabytes_a_second']:.1f} GB/s, {way['seconds']:.2f} s" for way in ways.values()], padding=4
    )
    axes.set_xlim(0, 1.35 * max(speeds))
    axes.invert_yaxis()
    where = report["machine"].get("gpu", report["machine"]["cpu"])
    axes.set_title(f"Opening {report['file_bytes'] / 1e9:.1f} GB, {where}, {report['date']}", fontsize=10)
    axes.set_xlabel("GB/s of weights, files in the page cache (median)")
    figure.savefig(path, dpi=150)
