"""`moebius bench`: measured suites, each beside its peer in the same run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import DtypeOption, Json, Quiet, Verbose

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure Moebius beside its peers.")

Layers = Annotated[int, typer.Option("--layers", min=1, help="Layers of the Qwen3-30B-A3B shape (1.25 GB each).")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Turns of each way; the median counts.")]
Where = Annotated[Path | None, typer.Option("--folder", help="Use this checkpoint instead of writing one.")]
On = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Ways = Annotated[list[str] | None, typer.Option("--way", help="Only this way; may be given more than once.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the report there, as JSON, with a picture beside it.")]

ShapeNames = Annotated[
    list[str] | None, typer.Option("--shape", help="A published layer's, or H,I,E,K; may be given more than once.")
]
Tokens = Annotated[
    list[int] | None, typer.Option("--tokens", min=1, help="Tokens of a call; may be given more than once.")
]
Backward = Annotated[
    bool | None, typer.Option("--backward/--no-backward", help="Forward and backward too. [default: on a GPU]")
]
Forms = Annotated[
    list[str] | None,
    typer.Option("--form", help="Also weights held as int8, int4, fp8 or mxfp4; may be given more than once."),
]
ComputeDtype = Annotated[Literal["bfloat16", "float16", "float32"], typer.Option("--dtype", help="Of the layer.")]
WholeModel = Annotated[
    bool, typer.Option("--model", help="Instead: the prefill by a transformers model, its experts and then ours.")
]
Table = Annotated[
    Path | None, typer.Option("--tune", help="Instead: try tiles for the fused forward, and write a table there.")
]


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
    from moebius.bench.reports import draw_speeds, write_report

    with tempfile.TemporaryDirectory(prefix="moebius-bench-") as temporary:
        place = folder or Path(temporary) / "model"
        if folder is None:
            write_checkpoint(place, {**QWEN3_30B_A3B, "num_hidden_layers": layers})
        report = suite.run(place, device, dtype, rounds, way or suite.PLAIN, console.note)
    if out:
        write_report(report, out, draw_speeds)
    if json:
        print_json(report)
    else:
        print_result(suite.table(report))


@bench.command("experts")
def experts(
    shape: ShapeNames = None,
    tokens: Tokens = None,
    way: Ways = None,
    rounds: Rounds = 5,
    backward: Backward = None,
    form: Forms = None,
    device: On = "cpu",
    dtype: ComputeDtype = "bfloat16",
    model: WholeModel = False,
    tune: Table = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """How fast one layer of experts is by every backend and peer, and how far that is from what the machine can do."""
    console = open_console(quiet, verbose)
    from moebius.bench import experts as suite

    training = device == "cuda" if backward is None else backward
    request = suite.Request(device, dtype, shape or (), tokens or (), way or (), form or (), training, rounds)
    if tune:
        suite.tune(request, tune, console.note)
        print_result(f"wrote {tune}")
        return
    report = suite.run_model(request, _command()) if model else suite.run(request, console.note, _command())
    if out:
        from moebius.bench.experts_picture import draw_roofline
        from moebius.bench.reports import write_report

        write_report(report, out, draw_roofline)
    if json:
        print_json(report)
    else:
        print_result(suite.table(report))


def _command() -> str:
    """The command as it was given, for the report."""
    import shlex
    import sys

    return shlex.join(["moebius", *sys.argv[1:]])
