"""`moebius plan`: what loading a model would do, before anything is read."""

from typing import TYPE_CHECKING

from moebius.cli.console import open_console, print_json, print_result
from moebius.cli.options import Device, DtypeOption, Json, Keys, Model, Offline, Quiet, Revision, Verbose

if TYPE_CHECKING:
    import torch

    from moebius.checkpoint.planning import Plan
    from moebius.errors import CapacityError


def plan(
    model: Model,
    keys: Keys = False,
    revision: Revision = "main",
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show how a model would be loaded. Which tensor goes where, and whether all fit; no weight is read."""
    open_console(quiet, verbose)
    from moebius.arguments import device_of
    from moebius.auto import open_checkpoint
    from moebius.cli.inspect import tensor_line, tensor_rows

    opened = open_checkpoint(model, dtype=dtype, revision=revision, local_files_only=offline)
    target = device_of(device)
    lack = shortage(opened.plan, target)
    tensors = tensor_rows(opened.plan) if keys else []
    if json:
        report = opened.plan.to_json() | {"device": str(target), "fits": lack is None}
        print_json(report | ({"keys": tensors} if keys else {}))
    else:
        verdict = f"{'fits' if lack is None else 'does not fit'} on {target}"
        print_result("\n".join([str(opened.plan), *map(tensor_line, tensors), verdict]))
    if lack is not None:
        raise lack


def shortage(plan: "Plan", device: "torch.device") -> "CapacityError | None":
    """The error that a load on `device` would end with for want of memory, or None: it fits."""
    from moebius.checkpoint.loading import check_room
    from moebius.errors import CapacityError

    try:
        check_room(plan, device)
    except CapacityError as error:
        return error
    return None
