"""`moebius bench parallel`: experts over several GPUs of one host, beside one GPU and beside transformers, in one run.

Each way is a launch of its own, of as many processes as it takes.  N ranks, E experts.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from moebius.bench.checkpoints import QWEN3_30B_A3B, write_checkpoint
from moebius.bench.load import machine, warm
from moebius.bench.parallel_rows import exchange_rows, way_row
from moebius.bench.parallel_ways import WAYS
from moebius.bench.parallel_worker import EXCHANGES, Job
from moebius.errors import ArgumentError, MoebiusError

KNOWN = (*WAYS, EXCHANGES)
WRONG = 0.1  # of the norm of one process's logits; half of the experts left out is 0.23 in two layers, rounding 0.01
AFTER_THE_LIMIT = 60.0  # seconds that a launch has to end once its ranks have given up
MOST_WORDS = 600  # characters of why a launch failed
OF_TORCHRUN = ("TORCHELASTIC_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_")


@dataclass(frozen=True)
class Request:
    """What to measure.  layers: of the Qwen3-30B-A3B shape, of which a checkpoint is written unless a folder is given.

    tokens: of each rank, in prefill.  rows, cached: sequences in all, and tokens of each, in decode.  ways: none means
    all.  rounds: launches of each way, in turns.  repeats: timed calls of a launch.  seconds: a launch's time limit.
    """

    device: str = "cuda"
    ranks: int = 2
    layers: int = 12
    folder: Path | None = None
    dtype: str = "auto"
    tokens: int = 8192
    rows: int = 8
    cached: int = 512
    ways: Sequence[str] = ()
    rounds: int = 1
    repeats: int = 7
    seconds: float = 240.0

    def all_ways(self) -> Sequence[str]:
        return [name for name in KNOWN if name in self.ways] if self.ways else KNOWN


def run(request: Request, say: Callable[[str], None], command: str = "") -> dict[str, Any]:
    """The report as plain data.  ArgumentError: an unknown device or way, or fewer GPUs than ranks.

    A way that fails or hangs becomes a row that says so; the others go on.
    """
    _check(request)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moebius-bench-") as temporary:
        folder = request.folder or _written(Path(temporary) / "model", request.layers)
        say(f"checkpoint ready, {warm(folder) / 1e9:.1f} GB: {time.perf_counter() - begin:.0f} s")
        config = json.loads((folder / "config.json").read_text())
        launches: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in request.all_ways()}
        for _ in range(request.rounds):
            for name in launches:
                warm(folder)
                launches[name].append(_launched(name, request, folder, Path(temporary)))
                say(f"{name}: {time.perf_counter() - begin:.0f} s so far")
    exchanges = exchange_rows(launches.pop(EXCHANGES, []))
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": machine(request.device),
        "device": request.device,
        "dtype": request.dtype,
        "model": config,
        "ranks": request.ranks,
        "tokens": request.tokens,
        "decode": {"rows": request.rows, "cached": request.cached},
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": [way_row(name, found, request.ranks, request.tokens, config) for name, found in launches.items()],
        **exchanges,
    }


def _check(request: Request) -> None:
    if unknown := [name for name in request.ways if name not in KNOWN]:
        raise ArgumentError(f"ways to run: {unknown[0]!r}; known: {', '.join(KNOWN)}")
    if request.device not in ("cuda", "cpu"):
        raise ArgumentError(f"device: {request.device!r}; known: cuda, cpu")
    found = torch.cuda.device_count()
    if request.device == "cuda" and found < request.ranks:
        raise ArgumentError(
            f"{request.ranks} ranks need a GPU each, found {found}",
            advice='say how many with --ranks, or --device "cpu"',
        )


def _written(folder: Path, layers: int) -> Path:
    write_checkpoint(folder, {**QWEN3_30B_A3B, "num_hidden_layers": layers})
    return folder


def refuse_wrong(report: Mapping[str, Any]) -> None:
    """MoebiusError: a way of ours gives other logits than one process."""
    for row in report["rows"]:
        found = row.get("comparison")
        if row["way"].startswith("moebius") and found and not found["relative"] <= WRONG:
            raise MoebiusError(
                f"{row['way']}: logits differ from one process's by {found['relative']:.0%} of their norm: a wrong "
                "answer, and figures that mean nothing"
            )


# --- a launch --------------------------------------------------------------------------------------------------------


def _launched(name: str, request: Request, folder: Path, temporary: Path) -> list[dict[str, Any]]:
    """What each rank found, in their order."""
    size = request.ranks if name == EXCHANGES else WAYS[name].size(request.ranks)
    with tempfile.TemporaryDirectory(dir=temporary) as found:
        job = Job(
            way=name,
            folder=str(folder),
            device=request.device,
            dtype=request.dtype,
            ranks=request.ranks,
            tokens=request.tokens,
            rows=request.rows,
            cached=request.cached,
            repeats=request.repeats,
            seconds=request.seconds,
            found=found,
            reference=str(temporary / "reference.pt"),
        )
        said = launch(_arguments(size, job), environment(request.device), request.seconds + AFTER_THE_LIMIT)
        return [found_by(Path(found) / f"rank-{rank}.json", said) for rank in range(size)]


def _arguments(size: int, job: Job) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    return [sys.executable, *launcher, "-m", "moebius.bench.parallel_worker", json.dumps(asdict(job))]


def environment(device: str) -> dict[str, str]:
    """This process's, without what torchrun told it, should it be one of a job itself."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OF_TORCHRUN)}
    return {**own, "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else own


def launch(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """Runs it to its end, or for so many seconds; "" if it ended well, else how it ended and the last that it said."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        if status == 0:
            return ""
        said.seek(0)
        ended = f"no end within {seconds:g} s" if status is None else f"ended with {status}"
        return f"{ended}: {_last_words(said.read())}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """torchrun passes a request to end on to its workers, which are in sessions of their own; then whatever is left."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # torchrun gives its workers 30
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Timeout" in line]
    return shorten((errors or lines or ["nothing was said"])[0 if errors else -1], MOST_WORDS)


def found_by(path: Path, said: str) -> dict[str, Any]:
    """What a rank wrote; where it did not end well, "reason" says why."""
    values = json.loads(path.read_text()) if path.exists() else {"stage": "start"}
    reason = f"{values['stage']}: {values.get('error') or said or 'no answer'}" if values["stage"] else ""
    return {**values, "reason": reason}
