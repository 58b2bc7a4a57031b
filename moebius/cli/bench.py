"""`moebius bench`: measured suites, each beside its peer in the same run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moebius.cli import launched
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

RankCount = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Processes, each with a GPU. [default: torchrun's, else 2]")
]
PromptTokens = Annotated[int, typer.Option("--tokens", min=16, help="Tokens of each rank's prompt.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Sequences in all, in decode.")]
Cached = Annotated[int, typer.Option("--cached", min=1, help="Tokens that each of them has, in decode.")]
Launches = Annotated[int, typer.Option("--rounds", min=1, help="Launches of each way, in turns; the median counts.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of a launch; the median counts.")]
Seconds = Annotated[float, typer.Option("--seconds", min=1.0, help="How long a launch may take.")]

NvLink = Annotated[float, typer.Option("--nvlink", help="GB/s that a GPU sends to others of its node; measured.")]
InfiniBand = Annotated[float, typer.Option("--infiniband", help="GB/s that a GPU sends to other nodes; assumed.")]
TeraFlops = Annotated[float, typer.Option("--tflops", help="TFLOP/s of the experts' products; measured.")]
Memory = Annotated[float, typer.Option("--memory", help="GB of a GPU.")]
Measured = Annotated[Path, typer.Option("--measured", help="A report of `moebius bench parallel` to hold it against.")]


@bench.command("load")
@launched.by_first_rank
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
@launched.by_first_rank
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


@bench.command("parallel")
@launched.by_first_rank
def parallel(
    ranks: RankCount = None,
    layers: Layers = 12,
    folder: Where = None,
    tokens: PromptTokens = 8192,
    rows: Rows = 8,
    cached: Cached = 512,
    way: Ways = None,
    rounds: Launches = 1,
    repeats: Repeats = 7,
    seconds: Seconds = 240.0,
    device: On = "cuda",
    dtype: DtypeOption = "auto",
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """How fast experts over several GPUs are: loading, prefill, decode, exchanges, beside one GPU and transformers.

    transformers' ways want transformers, and on GPUs or on several ranks accelerate too; what cannot run says why.
    """
    console = open_console(quiet, verbose)
    import os

    from moebius.bench import parallel as suite

    size = ranks or int(os.environ.get("WORLD_SIZE", "2"))
    request = suite.Request(
        device, size, layers, folder, dtype, tokens, rows, cached, way or (), rounds, repeats, seconds
    )
    report = suite.run(request, console.note, _command())
    if out:
        from moebius.bench.parallel_picture import draw_parallel
        from moebius.bench.reports import write_report

        write_report(report, out, draw_parallel)
    if json:
        print_json(report)
    else:
        from moebius.bench.parallel_rows import table

        print_result(table(report))
    suite.refuse_wrong(report)


@bench.command("scaling")
@launched.by_first_rank
def scaling(
    nvlink: NvLink = 310.0,
    infiniband: InfiniBand = 42.5,
    tflops: TeraFlops = 493.0,
    memory: Memory = 141.0,
    measured: Measured = Path("benchmarks/parallel_h200.json"),
    json: Json = False,
) -> None:
    """What expert parallelism should cost on 8 to 1024 GPUs: arithmetic, beside a measurement where there is one."""
    from json import loads

    from moebius.bench import scaling as model

    rates = model.Rates(nvlink * 1e9, infiniband * 1e9, tflops * 1e12, memory * 1e9)
    report = model.run(rates, measured, loads(measured.read_text()) if measured.exists() else None)
    if json:
        print_json(report)
    else:
        print_result(model.table(report))


def _command() -> str:
    """The command as it was given, for the report; of a path its last name alone, machines having their own."""
    import re
    import shlex
    import sys

    return shlex.join(["moebius", *(re.sub(r"^(--[a-z-]+=)?/.*/", r"\1", word) for word in sys.argv[1:])])
