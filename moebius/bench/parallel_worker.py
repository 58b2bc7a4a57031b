"""One rank of one way: `python -m moebius.bench.parallel_worker '{...}'`, by itself or as torchrun starts it.

What it finds goes into a file of its own after each stage, so that a later stage that fails or hangs costs only itself.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.bench.parallel_exchanges import exchange_rows
from moebius.bench.parallel_ways import COLLECTIVE_SECONDS, WAYS, Opened, opener
from moebius.distributed.config import DistributedConfig
from moebius.distributed.ranks import join
from moebius.distributed.spread import local

WARM_UPS = 3
STEPS = 20  # decode steps that are timed together
COMPARED = 16  # positions whose logits are held against one process's
EXCHANGES = "exchanges"


@dataclass(frozen=True)
class Job:
    """way: a name in WAYS, or EXCHANGES.  ranks: of the whole benchmark, which one way does not take all of.

    tokens: a rank's, in prefill.  rows: sequences in all, in decode.  cached: tokens that each of them has.
    repeats: calls that are timed.  seconds: after which a rank gives up, and says where it was.  found: a folder for
    what each rank finds.  reference: logits [ranks, COMPARED, V] of one process, which "moebius 1" writes.
    """

    way: str
    folder: str
    device: str
    dtype: str
    ranks: int
    tokens: int
    rows: int
    cached: int
    repeats: int
    seconds: float
    found: str
    reference: str


@dataclass
class Findings:
    """stage: the one that is under way, "" when all are over.  error: of the one that failed."""

    path: Path
    values: dict[str, Any] = field(default_factory=lambda: {"stage": "start"})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._write(stage=name)
        try:
            yield
        except Exception as error:
            self._write(error=f"{type(error).__name__}: {str(error).strip()[:600]}")
            raise
        self._write(stage="")

    def add(self, name: str, value: Any) -> None:
        self._write(**{name: value})

    def _write(self, **values: Any) -> None:
        self.values |= values
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.values))
        beside.replace(self.path)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def prompt(seed: int, rows: int, tokens: int, vocab_size: int) -> Tensor:
    """Random token ids [rows, tokens], the same for a seed on every device."""
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def measure(job: Job, findings: Findings) -> None:
    way = WAYS[job.way]
    with findings.stage("load"):
        model, load = _loaded(job)
        findings.add("load", load)
    vocab_size = model.model.get_parameter("model.embed_tokens.weight").shape[0]
    own = rank() if way.batch == "distinct" else 0
    with findings.stage("prefill"):
        ids = prompt(own, 1, job.tokens, vocab_size).to(model.device)
        findings.add("prefill_seconds", timed(lambda: model.logits(ids), model.device, job.repeats))
    with findings.stage("comparison"):
        findings.add("comparison", _compared(job, model, vocab_size, own))
    rows = len(range(own, job.rows, way.batches(job.ranks)))
    ids = prompt(job.ranks + own, max(1, rows), job.cached + 1, vocab_size).to(model.device)
    with findings.stage("decode"):
        step = model.step(ids)
        findings.add("step_seconds", timed(step, model.device, job.repeats, STEPS))
    if way.library == "moebius" and model.device.type == "cuda":
        with findings.stage("captured decode"):
            findings.add("captured", _captured(step, model.device, job.repeats))


def _loaded(job: Job) -> tuple[Opened, dict[str, Any]]:
    """Before the clock starts, libraries are imported, the device is awake, and ranks know each other."""
    load = opener(WAYS[job.way], job.folder, job.dtype, job.device, job.ranks)
    if WAYS[job.way].size(job.ranks) > 1:
        join(DistributedConfig(timeout_seconds=COLLECTIVE_SECONDS), 1, device_type=job.device)
        dist.barrier()
    if job.device == "cuda":
        torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    before, begin = _read_bytes(), time.perf_counter()
    model = load()
    wait(model.device)
    seconds = time.perf_counter() - begin
    held = {id(tensor): local(tensor) for tensor in model.model.parameters()}
    return model, {
        "seconds": seconds,
        "read_bytes": _read_bytes() - before,
        "planned_bytes": model.planned_bytes,
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
        "allocated_bytes": torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else None,
        "spelling": model.spelling,
    }


def _read_bytes() -> int:
    """What this process has read by calls so far; pages that it mapped are not counted."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def _compared(job: Job, model: Opened, vocab_size: int, own: int) -> dict[str, float] | None:
    """How far the logits are from those of one process; None: there are none, or they are written here."""
    if job.way == "moebius 1":
        prompts = [prompt(seed, 1, job.tokens, vocab_size).to(model.device) for seed in range(job.ranks)]
        logits = [model.logits(ids, COMPARED)[0].float().cpu() for ids in prompts]
        torch.save(torch.stack(logits), job.reference)
        return None
    if not Path(job.reference).exists():
        return None
    ids = prompt(own, 1, job.tokens, vocab_size).to(model.device)
    return difference(model.logits(ids, COMPARED)[0].float().cpu(), torch.load(job.reference)[own])


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """relative: of norms, NaN counting as infinity.  largest: of single logits.  same_token: share of positions."""
    relative = ((found - expected).norm() / expected.norm()).nan_to_num(float("inf"), float("inf"))
    return {
        "relative": relative.item(),
        "largest": (found - expected).abs().max().item(),
        "same_token": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def _captured(step: Callable[[], Tensor], device: torch.device, repeats: int) -> dict[str, Any]:
    """The step in a CUDA graph: its cache's length is fixed, so that all replays make the same step."""
    eager, graph = step().clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()
    seconds = timed(graph.replay, device, repeats, STEPS)
    return {"seconds": seconds, "differs": difference(logits.float(), eager.float())["relative"]}


def timed(call: Callable[[], Any], device: torch.device, repeats: int, times: int = 1) -> list[float]:
    """Seconds of a call, so many times a measurement, all ranks beginning together."""
    for _ in range(WARM_UPS):
        call()
    return [_seconds(call, device, times) for _ in range(repeats)]


def _seconds(call: Callable[[], Any], device: torch.device, times: int) -> float:
    wait(device)
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - begin) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(given: str) -> None:
    job = Job(**json.loads(given))
    faulthandler.dump_traceback_later(job.seconds, exit=True)
    findings = Findings(Path(job.found) / f"rank-{rank()}.json")
    if job.way == EXCHANGES:
        with findings.stage("exchanges"):
            findings.add("exchanges", exchange_rows(Path(job.folder), job.device, job.tokens, job.repeats, timed))
    else:
        measure(job, findings)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
