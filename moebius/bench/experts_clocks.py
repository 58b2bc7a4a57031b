"""How a call's time and memory are taken: on a GPU by CUDA events, on a CPU by the CPU time of the process."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from moebius.errors import MoebiusError

Call = Callable[[], object]
Result = TypeVar("Result")


class Clock(Protocol):
    """turn: how long one turn of a way should take.  limit: a call that takes longer is timed no more.  In seconds."""

    turn: float
    limit: float

    def seconds(self, call: Call, times: int) -> float:
        """Of one call, over so many in a row."""
        ...

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[Result, int]:
        """What the call gives, and the most memory that it held beyond what was held before.  For its first call."""
        ...

    def captured(self, call: Call) -> tuple[Call | None, str]:
        """The call as a CUDA graph to be replayed, or None and why not."""
        ...


class CudaClock:
    """Launches are included: calls are queued one after the other, and the events stand around them all."""

    turn, limit = 0.01, 0.5

    def seconds(self, call: Call, times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[Result, int]:
        """Of the second call: the first may compile, and try tiles."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def captured(self, call: Call) -> tuple[Call | None, str]:
        # a capture that fails leaves the allocator unusable, so what waits for the host is found out before
        try:
            with _no_waiting():
                call()
        except RuntimeError as error:
            return None, f"it waits for the host: {reason_of(error)}"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            return None, reason_of(error)
        graph.replay()
        return graph.replay, ""


class CpuClock:
    """CPU time of the process, which other programs on the machine disturb least."""

    turn, limit = 0.1, 10.0

    def seconds(self, call: Call, times: int) -> float:
        begin = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - begin) / times

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[Result, int]:
        """Of resident memory, what is packed once included.  A lower bound: the allocator keeps what was freed."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
        result = call()
        return result, max(0, _resident("VmHWM") - before)

    def captured(self, call: Call) -> tuple[Call | None, str]:
        return None, "no CUDA"


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


@contextmanager
def one_thread() -> Iterator[None]:
    """For a CPU: what is compared is the work, not how it is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reason_of(error: Exception) -> str:
    """In a line."""
    if isinstance(error, MoebiusError) and error.faults:
        return "; ".join(fault.detail or fault.what for fault in error.faults)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def measured_peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine can do: bytes a second, copied (read and written) and read, and the FLOP/s of a large product.

    On a CPU the product in float32 counts too, where it is the faster one: backends may take it.
    """
    clock, gpu = clock_of(device), device == "cuda"
    rates = _memory_rates(clock, device, (1 << 30) if gpu else (1 << 25))
    dtypes = [dtype] if gpu else [dtype, torch.float32]
    rate = max(_product_rate(clock, device, each, 8192 if gpu else 1024) for each in dtypes)
    return {**rates, "flop_a_second": rate}


def _memory_rates(clock: Clock, device: str, numbers: int) -> dict[str, float]:
    data = torch.ones(numbers, device=device)
    target = torch.empty_like(data)
    copied, read = _best(clock, lambda: target.copy_(data)), _best(clock, data.sum)
    return {"copied_bytes_a_second": 2 * data.nbytes / copied, "read_bytes_a_second": data.nbytes / read}


def _product_rate(clock: Clock, device: str, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(clock, lambda: left @ right)


def _best(clock: Clock, call: Call) -> float:
    call()
    return min(clock.seconds(call, 3) for _ in range(3))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
