"""The experts' report as a roofline picture."""

from pathlib import Path
from typing import Any

MARKERS = "osD^vPX*<>dph8"
COLORS = [f"C{number}" for number in range(10) if number != 7]  # which is gray


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    """Each shape's forward passes under the roof that this machine measured; no picture where nothing was measured."""
    rows = [row for row in report["rows"] if "reason" not in row and row["passes"] == "forward"]
    if not rows:
        return
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(5.2 * len(shapes) + 2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    styles = _styles([row["way"] for row in rows])
    for axes, shape in zip(panels, shapes, strict=True):
        _panel(axes, [row for row in rows if row["shape"] == shape], report["peaks"], styles)
        axes.set_title(shape, fontsize=10)
    panels[0].set_ylabel("TFLOP/s, forward (median; in a CUDA graph where it captures)")
    handles = dict(zip(*reversed(_legend(panels)), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    where = report["machine"].get("gpu", report["machine"]["cpu"])
    figure.suptitle(f"One layer of experts, {report['dtype']}, {where}, {report['date']}", fontsize=11)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, rows: list[dict[str, Any]], peaks: dict[str, float], styles: dict[str, dict[str, Any]]) -> None:
    bandwidth = max(peaks["copied_bytes_a_second"], peaks["read_bytes_a_second"])
    spans = [row["flop_a_byte"] for row in rows]
    low, high, knee = min(spans) / 1.5, max(spans) * 1.5, peaks["flop_a_second"] / bandwidth
    roof = sorted({low, min(max(knee, low), high), high})
    axes.loglog(roof, [min(bandwidth * x, peaks["flop_a_second"]) / 1e12 for x in roof], color="black", lw=1)
    for way, style in styles.items():
        own = [row for row in rows if row["way"] == way]
        points = [row["flop_a_byte"] for row in own], [row["teraflop_a_second"] for row in own]
        axes.loglog(*points, label=way, lw=1, ms=5, **style)
    axes.set_xlabel("FLOP a byte of the chosen experts' weights")
    axes.grid(alpha=0.3)


def _styles(ways: list[str]) -> dict[str, dict[str, Any]]:
    """Ours in colour, peers in gray."""
    names = list(dict.fromkeys(ways))
    ours = [name for name in names if name.startswith("moebius")]
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(ours)}
    return {
        name: {"color": colors.get(name, "gray"), "marker": MARKERS[number % len(MARKERS)]}
        for number, name in enumerate(names)
    }


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels."""
    both = [axes.get_legend_handles_labels() for axes in panels]
    return [handle for handles, _ in both for handle in handles], [label for _, labels in both for label in labels]
