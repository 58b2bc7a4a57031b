"""Kernels are compiled before anything is timed: in parallel, in processes of their own, which may hang or die.

What they compile lies in Triton's cache on disk, where the process that measures finds it.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

MOST_WORKERS = 12


def in_parallel(run: Callable[[Any], None], jobs: Sequence[Any], limit: float) -> list[str | None]:
    """run(job) for each, in fresh processes that end after `limit` seconds; for each why it failed, or None.

    run: a function of a module, whose jobs can be pickled.
    """
    if not jobs:
        return []
    deadline = time.monotonic() + limit
    workers = max(1, min(MOST_WORKERS, len(jobs), len(os.sched_getaffinity(0)) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # on leaving, its processes are ended
        results = [pool.apply_async(run, (job,)) for job in jobs]
        return [_outcome(result, deadline, limit) for result in results]


def _outcome(result: Any, deadline: float, limit: float) -> str | None:
    try:
        result.get(max(0.0, deadline - time.monotonic()))
    except multiprocessing.TimeoutError:
        return f"not compiled within {limit:.0f} s"
    except Exception as error:  # noqa: BLE001 - whatever another process met
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return None
