"""`moebius demo`: trains, saves, converts, loads, generates and plots a small MoE, offline, on the CPU."""

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli.console import open_console
from moebius.cli.options import Quiet, Verbose

Out = Annotated[Path, typer.Option("--out", help="The folder to write: new, empty, or a former demo's.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps; 900 take about half a minute.")]
DemoSeed = Annotated[int, typer.Option("--seed", min=0, help="Names the weights, the data's order, the sampling.")]


def demo(
    out: Out = Path("moebius-demo"),
    steps: Steps = 900,
    seed: DemoSeed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train, save and load a small MoE, with proofs. Offline, about a minute on two CPU cores."""
    console = open_console(quiet, verbose)
    from moebius.cli.demo.folder import demo_folder
    from moebius.cli.demo.stages import run_demo

    run_demo(demo_folder(out), steps, seed, console)
