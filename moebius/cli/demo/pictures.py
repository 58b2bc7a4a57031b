"""The demo's pictures: expert load and the loss. The numbers stand beside each as JSON; without matplotlib, alone.

L MoE layers, E experts.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch import Tensor

SMOOTHING = 25  # steps in the running mean of the loss
HINT = "no pictures: matplotlib is not installed (pip install 'moebius[plots]'); their numbers are in the JSON files"


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw_expert_load(path: Path, tables: dict[str, "Tensor"]) -> None:
    """tables: text's name -> [L, E] counts. Draws each layer's share of its choices that every expert got."""
    shares = {name: (table / table.sum(dim=1, keepdim=True).clamp(min=1)).tolist() for name, table in tables.items()}
    counts = {name: table.tolist() for name, table in tables.items()}
    _write_numbers(path, {"title": "expert load", "rows": "MoE layers", "columns": "experts", "counts": counts})
    if can_draw():
        _save(path, _heat_maps(shares))


def draw_loss(path: Path, losses: Sequence[float]) -> None:
    """losses: nats a token, one a step."""
    _write_numbers(path, {"title": "training loss", "unit": "nats a token", "losses": list(losses)})
    if can_draw():
        _save(path, _curve(losses))


def _write_numbers(path: Path, numbers: dict[str, object]) -> None:
    path.with_suffix(".json").write_text(json.dumps(numbers) + "\n")


def _save(path: Path, figure: "Figure") -> None:
    figure.savefig(path, dpi=150)


def _heat_maps(shares: dict[str, list[list[float]]]) -> "Figure":
    """One map a text, on one scale, so that they can be compared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(shares), 3.4), layout="constrained")
    axes = figure.subplots(1, len(shares), squeeze=False)[0]
    highest = max(max(map(max, table)) for table in shares.values())
    even = 1 / len(next(iter(shares.values()))[0])
    images = []
    for place, (name, table) in zip(axes, shares.items(), strict=True):
        images.append(_heat_map(place, table, highest))
        place.set(title=name, xlabel="expert", xticks=range(len(table[0])), yticks=range(len(table)))
    axes[0].set_ylabel("MoE layer")
    figure.colorbar(images[0], ax=axes, label="share of the layer's choices")
    figure.suptitle(f"Expert load (an even share is {even:.1%})")
    return figure


def _heat_map(place: "Axes", table: list[list[float]], highest: float) -> "AxesImage":
    """Draws table [L, E] of shares; each cell says its share too, dark on light and light on dark."""
    image = place.imshow(table, cmap="viridis", vmin=0.0, vmax=highest, aspect="auto")
    for layer, row in enumerate(table):
        for expert, share in enumerate(row):
            colour = "black" if share > 0.6 * highest else "white"
            place.text(expert, layer, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _curve(losses: Sequence[float]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    place = figure.subplots()
    steps = range(1, len(losses) + 1)
    place.plot(steps, losses, color="#b0c4de", linewidth=0.8, label="each step")
    place.plot(steps, running_mean(losses), color="#1f4e8c", label=f"mean of the last {SMOOTHING} steps")
    place.set(title="Training loss", xlabel="step", ylabel="nats a token")
    place.grid(alpha=0.3)
    place.legend(frameon=False)
    return figure


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to SMOOTHING - 1 before it."""
    starts = (max(0, end - SMOOTHING) for end in range(1, len(values) + 1))
    return [sum(values[start : end + 1]) / (end + 1 - start) for end, start in enumerate(starts)]
