"""`moebius env`: versions, devices, and which backends can run here, or why not."""

import platform
from typing import TYPE_CHECKING

from moebius.cli.console import print_json, print_result
from moebius.cli.options import Json

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "triton", "transformers", "matplotlib")
CAN_RUN = "can run"


def env(json: Json = False) -> None:
    """Show versions, devices and backends. For a backend that cannot run here, why."""
    report = {"versions": versions(), "devices": devices(), "experts": experts_backends()}
    if json:
        print_json(report)
    else:
        print_result("\n".join(_section(title, rows) for title, rows in report.items()))


def versions() -> dict[str, str]:
    from importlib import metadata

    import moebius

    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    ours = {"moebius": moebius.__version__, "python": platform.python_version(), "system": platform.platform()}
    return ours | {name: installed.get(name, "not installed") for name in LIBRARIES}


def devices() -> dict[str, str]:
    import torch

    from moebius.checkpoint.describe import size
    from moebius.cli.memory import host_memory

    found = {"cpu": f"{torch.get_num_threads()} threads, {size(host_memory())} of memory"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{card.name}, {size(card.total_memory)} of memory"
    return found


def experts_backends() -> dict[str, str]:
    """Name and device -> "can run", or the reasons against; judged at bfloat16 and sizes that suit any kernel."""
    import torch

    from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        f"{name} on {kind}": _verdict(name, kind, torch.bfloat16) for name in ALL_EXPERTS_FUNCTIONS for kind in kinds
    }


def _verdict(name: str, device_type: str, dtype: "torch.dtype") -> str:
    import torch

    from moebius.experts.select import Situation, backend_obstacles

    capability = torch.cuda.get_device_capability() if device_type == "cuda" else None
    obstacles = backend_obstacles(name, Situation(device_type, dtype, 1024, 1024, capability=capability))
    return "; ".join(obstacles) or CAN_RUN


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
