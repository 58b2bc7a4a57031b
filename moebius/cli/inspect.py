"""`moebius inspect`: what a model is, from its headers alone."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import Batch, Context, DtypeOption, Json, Keys, Model, Offline, Quiet, Revision, Verbose

if TYPE_CHECKING:
    from moebius.auto import OpenedCheckpoint
    from moebius.checkpoint.planning import Plan
    from moebius.cli.console import Console

CheckTensors = Annotated[bool, typer.Option("--check-tensors", help="Read every weight too, and refuse NaN.")]


def inspect(
    model: Model,
    ctx: Context = 4096,
    batch: Batch = 1,
    keys: Keys = False,
    check_tensors: CheckTensors = False,
    revision: Revision = "main",
    dtype: DtypeOption = "auto",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model is, from its headers. Parameters, total and active, bytes, KV cache, layout."""
    console = open_console(quiet, verbose)
    from moebius.auto import open_checkpoint

    opened = open_checkpoint(model, dtype=dtype, revision=revision, local_files_only=offline)
    report = description(model, opened, ctx, batch)
    if check_tensors:
        report |= {"nan": read_all(opened.plan, console)}
    tensors = tensor_rows(opened.plan) if keys else []
    if json:
        print_json(report | ({"tensors": tensors} if keys else {}))
    else:
        print_result("\n".join([table(report), *map(tensor_line, tensors)]))


def read_all(plan: "Plan", console: "Console") -> int:
    """Reads every tensor, as a load on the CPU would, and looks for NaN: 0, or CheckpointError that says where."""
    import torch

    from moebius import checkpoint
    from moebius.checkpoint.loading import check_room
    from moebius.cli.progress import loading_bar

    check_room(plan, torch.device("cpu"))
    checkpoint.load(plan, check_tensors=True, progress=loading_bar(console))
    return 0


def description(name: str, opened: "OpenedCheckpoint", ctx: int, batch: int) -> dict[str, Any]:
    """What is printed, as data. Counts are parameters; sizes are bytes in the dtype that a load would have."""
    return {"model": name} | _shape(opened) | _sizes(opened, ctx, batch)


def _shape(opened: "OpenedCheckpoint") -> dict[str, Any]:
    from moebius.cli.facts import experts_layout

    config, files = opened.config, opened.files
    return {
        "model_type": config.model_type,
        "layers": len(config.layers),
        "experts": max((layer.num_experts for layer in config.moe_layers), default=0),
        "experts_per_token": max((layer.top_k for layer in config.moe_layers), default=0),
        "tensors": len(files.tensors),
        "files": {shard.path.name: shard.size for shard in files.shards},
        "layout": experts_layout(opened.plan),
        "dtype": opened.dtype,
    }


def _sizes(opened: "OpenedCheckpoint", ctx: int, batch: int) -> dict[str, Any]:
    from moebius.checkpoint.files import ITEM_BYTES
    from moebius.cli.facts import model_facts

    facts, width = model_facts(opened.config), ITEM_BYTES[opened.dtype]
    token = facts.cached * width
    return {
        "parameters": {"experts": facts.experts, "rest": facts.rest, "total": facts.total, "active": facts.active},
        "bytes": {"experts": facts.experts * width, "rest": facts.rest * width, "total": facts.total * width},
        "bytes_read_per_token": facts.read * width,
        "kv_cache": {"bytes_per_token": token, "context": ctx, "batch": batch, "bytes": token * ctx * batch},
    }


def table(report: dict[str, Any]) -> str:
    from moebius.checkpoint.describe import size

    rows = [
        f"  {part:<8} {count(report['parameters'][part]):>9}  {report['dtype']} {size(report['bytes'][part]):>10}"
        for part in ("experts", "rest", "total")
    ]
    checked = [f"  all {report['tensors']:,} tensors were read: no NaN"] if "nan" in report else []
    return "\n".join([_headline(report), *rows, _per_token(report), *checked])


def _headline(report: dict[str, Any]) -> str:
    experts = f"{report['experts']} experts, {report['experts_per_token']} a token" if report["experts"] else "dense"
    files = "1 file" if len(report["files"]) == 1 else f"{len(report['files'])} files"
    return (
        f"{report['model']}  {report['model_type']}, {report['layers']} layers, {experts}; "
        f"{report['tensors']:,} tensors in {files}, {report['layout']}, complete"
    )


def _per_token(report: dict[str, Any]) -> str:
    from moebius.checkpoint.describe import size

    cache = report["kv_cache"]
    sequences = f" x {cache['batch']}" if cache["batch"] > 1 else ""
    active = count(report["parameters"]["active"])
    return (
        f"  active {active}; a decoded token reads {size(report['bytes_read_per_token'])}; "
        f"KV cache {cache['bytes_per_token'] / 1024:g} KiB a token, {size(cache['bytes'])} at "
        f"{cache['context']:,}{sequences}"
    )


def count(parameters: int) -> str:
    """1234567890 is 1.23 B, as the field says it."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.2f} {unit}"
    return str(parameters)


def tensor_rows(plan: "Plan") -> list[dict[str, Any]]:
    """Every stored tensor, skipped ones too, in the order of their names."""
    tensors = sorted(plan.files.tensors.values(), key=lambda tensor: tensor.name)
    return [
        {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes, "file": info.file}
        for info in tensors
    ]


def tensor_line(row: dict[str, Any]) -> str:
    return f"  {row['name']}  {row['dtype']} {row['shape']}  {row['file']}"
