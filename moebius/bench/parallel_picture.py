"""The report of `moebius bench parallel` as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_parallel(report: dict[str, Any], path: Path) -> None:
    """Prefill and decode of each way that was measured; no picture where none was."""
    prefill = [(row["way"], row["prefill"]["tokens_a_second"]) for row in report["rows"] if "prefill" in row]
    if not prefill:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.5 * len(prefill) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, prefill, "{:,.0f}")
    left.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
    left.set_xlabel(f"tokens a second, prefill of {report['tokens']} tokens a batch (median)")
    _bars(right, [step for row in report["rows"] for step in _steps(row)], "{:.3g} ms")
    right.set_xlabel(f"ms a decode step of {report['decode']['rows']} rows in all (median)")
    where = report["machine"].get("gpu", report["machine"]["cpu"])
    layers, kind = report["model"]["num_hidden_layers"], report["model"]["model_type"]
    figure.suptitle(f"{report['ranks']} ranks, {layers} layers of {kind}, {where}, {report['date']}", fontsize=10)
    figure.savefig(path, dpi=150)


def _steps(row: dict[str, Any]) -> list[tuple[str, float]]:
    names = {"step_seconds": "", "captured_step_seconds": ", captured"}
    return [(f"{row['way']}{how}", row[name] * 1e3) for name, how in names.items() if name in row]


def _bars(axes: Any, bars: Sequence[tuple[str, float]], form: str) -> None:
    names, values = [name for name, _ in bars], [value for _, value in bars]
    if not values:
        return
    colors = ["tab:blue" if name.startswith("moebius") else "tab:gray" for name in names]
    axes.bar_label(axes.barh(names, values, color=colors), [form.format(value) for value in values], padding=4)
    axes.set_xlim(0, 1.3 * max(values))
    axes.invert_yaxis()
