"""`moebius plan`: what loading a model would do, before anything is read."""

from itertools import count
from typing import TYPE_CHECKING

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import (
    Device,
    DtypeOption,
    ExpertsOnly,
    GroupSize,
    Json,
    Keys,
    Model,
    ModulesToNotConvert,
    Offline,
    Quantization,
    Quiet,
    Ranks,
    Revision,
    Verbose,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moebius.checkpoint.planning import Plan
    from moebius.errors import CapacityError
    from moebius.placement import RankShare


def plan(
    model: Model,
    keys: Keys = False,
    revision: Revision = "main",
    dtype: DtypeOption = "auto",
    quantization: Quantization = None,
    group_size: GroupSize = None,
    experts_only: ExpertsOnly = False,
    modules_to_not_convert: ModulesToNotConvert = None,
    device: Device = "auto",
    ranks: Ranks = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show how a model would be loaded. Which tensor goes where, and whether all fit; no weight is read."""
    open_console(quiet, verbose)
    from moebius.arguments import device_map_of
    from moebius.auto import open_checkpoint
    from moebius.checkpoint.loading import free_bytes, needed_bytes
    from moebius.cli.inspect import tensor_line, tensor_rows
    from moebius.cli.quantization import quantization_of
    from moebius.placement import hf_device_map, place, rank_shares

    opened = open_checkpoint(
        model,
        dtype=dtype,
        quantization=quantization_of(quantization, group_size, experts_only, modules_to_not_convert),
        revision=revision,
        local_files_only=offline,
    )
    devices = place(device_map_of(device), opened.plan, free_bytes)
    needed, lack = needed_bytes(opened.plan, devices), shortage(opened.plan, devices)
    target = ", ".join(needed)
    tensors = tensor_rows(opened.plan) if keys else []
    of_ranks = rank_shares(opened.plan, ranks) if ranks else []
    if json:
        report = opened.plan.to_json() | {"device": target, "fits": lack is None, "peak_bytes_of_devices": needed}
        report["device_map"] = hf_device_map(devices)
        report["ranks"] = [{"reads": share.reads, "holds": share.holds} for share in of_ranks]
        print_json(report | ({"keys": tensors} if keys else {}))
    else:
        verdict = f"{'fits' if lack is None else 'does not fit'} on {target}"
        lines = [*map(tensor_line, tensors), *shares(opened.plan, devices), *map(rank_line, count(), of_ranks)]
        print_result("\n".join([str(opened.plan), *lines, verdict]))
    if lack is not None:
        raise lack


def rank_line(rank: int, share: "RankShare") -> str:
    from moebius.checkpoint.describe import size

    return f"rank {rank}: reads {size(share.reads)}, holds {size(share.holds)}"


def shares(plan: "Plan", devices: "Mapping[str, str]") -> list[str]:
    """What each device would hold, and need at the peak of loading; nothing to say where it is one."""
    from moebius.checkpoint.describe import size
    from moebius.checkpoint.loading import needed_bytes
    from moebius.placement import part_of, parts_of

    placed = {part_of(name): device for name, device in devices.items()}
    parts = {device: [part for part in parts_of(plan) if placed[part] == device] for device in placed.values()}
    lines = [f"{size(n)} on {device}: {_span(parts[device])}" for device, n in needed_bytes(plan, devices).items()]
    return lines if len(lines) > 1 else []


def _span(parts: "Sequence[str]") -> str:
    return parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]}"


def shortage(plan: "Plan", devices: "Mapping[str, str]") -> "CapacityError | None":
    """The error that a load would end with for want of memory, or None: it fits."""
    from moebius.checkpoint.loading import check_room
    from moebius.errors import CapacityError

    try:
        check_room(plan, devices)
    except CapacityError as error:
        return error
    return None
