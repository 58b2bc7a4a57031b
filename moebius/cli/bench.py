"""`moebius bench`: measured suites, each beside its peer in the same run."""

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import DtypeOption, Json, Quiet, Verbose

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure Moebius beside its peers.")

Layers = Annotated[int, typer.Option("--layers", min=1, help="Layers of the Qwen3-30B-A3B shape (1.25 GB each).")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Loads of each kind; the median counts.")]
Where = Annotated[Path | None, typer.Option("--folder", help="Use this checkpoint instead of writing one.")]
On = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Ways = Annotated[list[str] | None, typer.Option("--way", help="Only this way; may be given more than once.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the report there, as JSON, with a picture beside it.")]


@bench.command("load")
def load(
    layers: Layers = 3,
    rounds: Rounds = 5,
    folder: Where = None,
    device: On = "cpu",
    dtype: DtypeOption = "auto",
    way: Ways = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """How long opening a checkpoint takes, how much memory it needs, beside transformers, with the files warm."""
    console = open_console(quiet, verbose)
    import tempfile

    from moebius.bench import load as suite
    from moebius.bench.checkpoints import QWEN3_30B_A3B, write_checkpoint
    from moebius.bench.reports import write_report

    with tempfile.TemporaryDirectory(prefix="moebius-bench-") as temporary:
        place = folder or Path(temporary) / "model"
        if folder is None:
            write_checkpoint(place, {**QWEN3_30B_A3B, "num_hidden_layers": layers})
        report = suite.run(place, device, dtype, rounds, way or suite.PLAIN, console.note)
    if out:
        write_report(report, out)
    if json:
        print_json(report)
    else:
        print_result(suite.table(report))
