"""`moebius inspect`: what a model is, from its headers alone, or from its config.json alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import Batch, Context, DtypeOption, Json, Keys, Model, Offline, Quiet, Revision, Verbose

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.checkpoint.planning import Plan
    from moebius.cli.console import Console
    from moebius.cli.facts import ModelFacts
    from moebius.config import DecoderConfig
    from moebius.opening import OpenedCheckpoint

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
    """Show what a model is, from its headers. Parameters, total and active, bytes, KV cache, layout, quantized forms.
    A folder that holds no weights, or a config.json, is described by its config.
    """
    console = open_console(quiet, verbose)
    from moebius.auto import open_checkpoint

    if is_config_alone(Path(model)):
        report, tensors = config_description(model, dtype, ctx, batch), []
    else:
        opened = open_checkpoint(model, dtype=dtype, revision=revision, local_files_only=offline)
        report = description(model, opened, ctx, batch)
        report |= {"nan": read_all(opened.plan, console)} if check_tensors else {}
        tensors = tensor_rows(opened.plan) if keys else []
    if json:
        print_json(report | ({"tensors": tensors} if keys else {}))
    else:
        print_result("\n".join([table(report), *map(tensor_line, tensors)]))


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


def is_config_alone(path: Path) -> bool:
    """A config.json, or a folder that holds one and no weights of any kind."""
    if path.is_file():
        return path.suffix == ".json"
    return (path / "config.json").is_file() and not any(file for kind in WEIGHTS for file in path.glob(kind))


def read_all(plan: "Plan", console: "Console") -> int:
    """Reads every tensor, as a load on the CPU would, and looks for NaN: 0, or CheckpointError that says where."""
    import torch

    from moebius import checkpoint
    from moebius.checkpoint.loading import check_room
    from moebius.cli.progress import loading_bar

    check_room(plan, torch.device("cpu"))
    checkpoint.load(plan, check_tensors=True, progress=loading_bar(console))
    return 0


def config_description(name: str, dtype: str, ctx: int, batch: int) -> dict[str, Any]:
    """As `description`, from a config alone: of a model of plain weights."""
    from moebius.arguments import dtype_name_of
    from moebius.checkpoint.files import ITEM_BYTES
    from moebius.model_folder import read_config
    from moebius.models import family_of

    raw = read_config(Path(name))
    family = family_of(raw)
    config, form = family.from_hf(raw), family.stored_form(raw)
    counted = dtype_name_of(dtype) or config.dtype or ("bfloat16" if form else "float32")
    width, head = ITEM_BYTES[counted], _shape(config) | {"dtype": counted}
    sizes = _sizes(config, ctx, batch, width, lambda facts: (facts.experts * width, facts.rest * width))
    return {"model": name} | head | {"published_form": form and form.name} | sizes


def description(name: str, opened: "OpenedCheckpoint", ctx: int, batch: int) -> dict[str, Any]:
    """What is printed, as data. Counts are parameters; sizes are bytes in the forms that a load would have."""
    from moebius.checkpoint.files import ITEM_BYTES
    from moebius.cli.facts import experts_layout
    from moebius.cli.storage import as_rows, storage

    stored = storage(opened)
    held = {part: sum(one.memory_bytes for one in stored if one.part == part) for part in ("experts", "rest")}
    files = {
        "tensors": len(opened.files.tensors),
        "files": {shard.path.name: shard.size for shard in opened.files.shards},
        "layout": experts_layout(opened.plan),
        "dtype": opened.dtype,
        "storage": as_rows(stored),
        "skipped": opened.plan.to_json()["skipped"],
    }
    width = ITEM_BYTES[opened.dtype]
    sizes = _sizes(opened.config, ctx, batch, width, lambda facts: (held["experts"], held["rest"]))
    return {"model": name} | _shape(opened.config) | files | sizes


def _shape(config: "DecoderConfig") -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "layers": len(config.layers),
        "experts": max((layer.num_experts for layer in config.moe_layers), default=0),
        "experts_per_token": max((layer.top_k for layer in config.moe_layers), default=0),
    }


def _sizes(
    config: "DecoderConfig", ctx: int, batch: int, width: int, held: "Callable[[ModelFacts], tuple[int, int]]"
) -> dict[str, Any]:
    """width: bytes of a number in the cache and the embedding.  held: bytes of experts and of all others."""
    from moebius.cli.facts import model_facts

    facts = model_facts(config)
    experts, rest = held(facts)
    token = facts.cached * width
    chosen = experts * (facts.active - facts.rest) // facts.experts if facts.experts else 0
    read = rest - (facts.active - facts.read) * width + chosen
    return {
        "parameters": {"experts": facts.experts, "rest": facts.rest, "total": facts.total, "active": facts.active},
        "bytes": {"experts": experts, "rest": rest, "total": experts + rest},
        "bytes_read_per_token": read,
        "kv_cache": {"bytes_per_token": token, "context": ctx, "batch": batch, "bytes": token * ctx * batch},
    }


def table(report: dict[str, Any]) -> str:
    from moebius.checkpoint.describe import size
    from moebius.cli.storage import held_as, lines

    rows = [
        f"  {part:<8} {count(report['parameters'][part]):>9}  {held_as(report, part)} {size(report['bytes'][part]):>10}"
        for part in ("experts", "rest", "total")
    ]
    checked = [f"  all {report['tensors']:,} tensors were read: no NaN"] if "nan" in report else []
    return "\n".join([_headline(report), *rows, _per_token(report), *lines(report), *_skipped(report), *checked])


def _skipped(report: dict[str, Any]) -> list[str]:
    """A line a reason."""
    from moebius.checkpoint.describe import size

    groups: dict[str, list[int]] = {}
    for tensor in report.get("skipped", []):
        groups.setdefault(tensor["reason"], []).append(tensor["bytes"])
    return [f"  skipped  {len(group):,} tensors, {size(sum(group))}: {reason}" for reason, group in groups.items()]


def _headline(report: dict[str, Any]) -> str:
    experts = f"{report['experts']} experts, {report['experts_per_token']} a token" if report["experts"] else "dense"
    head = f"{report['model']}  {report['model_type']}, {report['layers']} layers, {experts}; "
    if "files" not in report:
        form = report["published_form"]
        published = f"; published as {form}, sizes are of plain weights" if form else ""
        return head + "its config alone, no weights" + published
    files = "1 file" if len(report["files"]) == 1 else f"{len(report['files'])} files"
    return head + f"{report['tensors']:,} tensors in {files}, {report['layout']}, complete"


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
