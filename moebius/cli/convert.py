"""`moebius convert`: a checkpoint in another form: quantized, plain, of another dtype, packed, in other shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import (
    DtypeOption,
    ExpertsOnly,
    GroupSize,
    Json,
    Model,
    ModulesToNotConvert,
    Offline,
    Quantization,
    Quiet,
    Revision,
    Verbose,
)

if TYPE_CHECKING:
    from moebius.opening import OpenedCheckpoint

Layout = Literal["per-expert", "packed"]
LAYOUTS = {"per-expert": "published", "packed": "packed"}
WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
REWRITTEN = ("config.json", "generation_config.json", "SHA256SUMS")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: new or empty.")]
LayoutOption = Annotated[
    Layout | None,
    typer.Option("--layout", help="per-expert: as the family is published; packed: a layer's experts in one tensor."),
]
MaxShardSize = Annotated[str | None, typer.Option("--max-shard-size", help="Begin a new file beyond this: 5GB, 200MB.")]


def convert(
    model: Model,
    out: Out,
    quantization: Quantization = None,
    group_size: GroupSize = None,
    experts_only: ExpertsOnly = False,
    modules_to_not_convert: ModulesToNotConvert = None,
    dtype: DtypeOption = "auto",
    layout: LayoutOption = None,
    max_shard_size: MaxShardSize = None,
    revision: Revision = "main",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint in another form. Quantized, plain (--dtype), packed or per expert, with its tokenizer; the
    model that is written has to fit into memory.
    """
    console = open_console(quiet, verbose)
    from moebius.cli.progress import loading_bar
    from moebius.cli.quantization import quantization_of

    wanted = quantization_of(quantization, group_size, experts_only, modules_to_not_convert)
    check_arguments(out, bool(wanted or layout or max_shard_size or dtype != "auto"))
    from moebius.auto import AutoModelForCausalLM, open_checkpoint

    opened = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=wanted,
        revision=revision,
        local_files_only=offline,
        progress=loading_bar(console),
    )
    anew = LAYOUTS[layout] if layout else "published" if max_shard_size else None
    opened.save_pretrained(out, max_shard_size=max_shard_size or "5GB", layout=anew, progress=loading_bar(console))
    copied = copy_others(opened.source.folder, out)
    report = description(opened.source, open_checkpoint(out), copied)
    print_json(report) if json else print_result(summary(report))


def check_arguments(out: Path, asked: bool) -> None:
    """ArgumentError: nothing is asked for, or `out` is not a new or empty folder."""
    from moebius.errors import ArgumentError

    if not asked:
        raise ArgumentError("nothing to convert: say --quantization, --dtype, --layout or --max-shard-size")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArgumentError(f"{out} is there already; nothing was written", advice="give a new folder, or an empty one")


def copy_others(source: Path, out: Path) -> list[str]:
    """Copies the files that are no weights and were not written anew; folders stay behind."""
    import shutil

    names = sorted(path.name for path in others(source))
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


def others(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        weights = any(path.match(kind) for kind in WEIGHTS)
        if path.is_file() and not weights and not path.name.startswith(".") and path.name not in REWRITTEN:
            yield path


def description(source: "OpenedCheckpoint", written: "OpenedCheckpoint", copied: list[str]) -> dict[str, Any]:
    """What was done, as data; what was written was opened again, and is complete."""
    from moebius.cli.facts import experts_layout

    return {
        "source": {"folder": str(source.folder), "bytes": stored_bytes(source)},
        "folder": str(written.folder),
        "files": {shard.path.name: shard.size for shard in written.files.shards},
        "tensors": len(written.files.tensors),
        "bytes": stored_bytes(written),
        "dtype": written.dtype,
        "forms": sorted({form.name for form in written.held.values()}),
        "layout": experts_layout(written.plan),
        "copied": copied,
    }


def stored_bytes(opened: "OpenedCheckpoint") -> int:
    return sum(info.nbytes for info in opened.files.tensors.values())


def summary(report: dict[str, Any]) -> str:
    from moebius.checkpoint.describe import size

    files = "1 file" if len(report["files"]) == 1 else f"{len(report['files'])} files"
    held = " + ".join([*report["forms"], report["dtype"]])
    lines = [
        f"{report['folder']}  {report['tensors']:,} tensors in {files}, {report['layout']}, complete",
        f"  {held}, {size(report['bytes'])}; the source has {size(report['source']['bytes'])}",
    ]
    return "\n".join([*lines, *([f"  copied {', '.join(report['copied'])}"] if report["copied"] else [])])
