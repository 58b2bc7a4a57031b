"""`moebius bench load`: how long opening a model takes, beside transformers, in alternating fresh processes."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moebius.errors import ArgumentError

SYNC = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}

# What is compared: the way that load_once takes, and what its environment says.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "moebius": ("moebius", {}),
    "moebius copied": ("moebius copied", {}),
    "moebius sync": ("moebius sync", {}),
    "moebius int4": ("moebius int4", {}),
    "moebius int4 after": ("moebius int4 after", {}),
    "transformers": ("transformers", {}),
    "transformers sync": ("transformers", SYNC),
}


PLAIN = [name for name in WAYS if "int4" not in name]


def run(folder: Path, device: str, dtype: str, rounds: int, ways: Sequence[str], say: Callable[[str], None]) -> Any:
    """Loads `folder` `rounds` times in each way, in turns; the report as plain data.

    The files are read before every load: some machines give up cached pages within seconds.
    ArgumentError: a way that is not in WAYS.
    """
    if unknown := [name for name in ways if name not in WAYS]:
        raise ArgumentError(f"ways to load: {unknown[0]!r}; known: {', '.join(WAYS)}")
    file_bytes = warm(folder)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways:
            warm(folder)
            once = _once(name, folder, device, dtype)
            results[name].append(once)
            say(f"round {number + 1} of {rounds}  {name:<18} {once['seconds']:.2f} s")
    return {
        "date": date.today().isoformat(),
        "machine": machine(device),
        "device": device,
        "dtype": dtype,
        "file_bytes": file_bytes,
        "ways": {name: summary(runs, file_bytes) for name, runs in results.items()},
        "runs": results,
    }


def warm(folder: Path) -> int:
    """Reads all weights into the page cache; their bytes."""
    buffer, total = bytearray(16 << 20), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def _once(name: str, folder: Path, device: str, dtype: str) -> dict[str, Any]:
    way, environment = WAYS[name]
    given = json.dumps({"way": way, "folder": str(folder), "device": device, "dtype": dtype})
    command = [sys.executable, "-m", "moebius.bench.load_once", given]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if ended.returncode:
        raise RuntimeError(f"{name} did not load {folder}:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def summary(runs: Sequence[dict[str, Any]], file_bytes: int) -> dict[str, Any]:
    """Medians; memory as a multiple of the model's bytes."""
    seconds = statistics.median(run["seconds"] for run in runs)
    nbytes = runs[0]["model_bytes"]
    report = {
        "seconds": round(seconds, 3),
        "best_seconds": round(min(run["seconds"] for run in runs), 3),
        "touch_seconds": round(statistics.median(run["touch_seconds"] for run in runs), 3),
        "gigabytes_a_second": round(file_bytes / seconds / 1e9, 2),
        "anonymous_of_model": round(max(run["anonymous_bytes"] for run in runs) / nbytes, 3),
    }
    if "device_bytes" in runs[0]:
        report["device_of_model"] = round(max(run["device_bytes"] for run in runs) / nbytes, 3)
        report["reserved_of_model"] = round(max(run["reserved"] for run in runs) / nbytes, 3)
    return report


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return {
        "cpu": names[0] if names else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        **gpu,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def table(report: dict[str, Any]) -> str:
    peer = report["ways"].get("transformers", {}).get("seconds")
    head = f"{report['file_bytes'] / 1e9:.2f} GB to {report['device']}, dtype {report['dtype']}, medians"
    rows = [f"{'':<18} {'s':>8} {'best':>8} {'touch':>7} {'GB/s':>7} {'x peer':>7} {'anon':>6} {'device':>7}"]
    for name, way in report["ways"].items():
        times = f"{peer / way['seconds']:.2f}" if peer else ""
        device = f"{way['device_of_model']:.3f}" if "device_of_model" in way else ""
        figures = f"{way['seconds']:>8.3f} {way['best_seconds']:>8.3f} {way['touch_seconds']:>7.3f}"
        memory = f"{way['anonymous_of_model']:>6.3f} {device:>7}"
        rows.append(f"{name:<18} {figures} {way['gigabytes_a_second']:>7.2f} {times:>7} {memory}")
    return "\n".join([head, *rows])
