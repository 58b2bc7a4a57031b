"""Independent jobs on a few threads; the first error, or an interrupt, stops all of them."""

import os
from collections.abc import Callable, Iterable
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")
MAX_READERS = 16


def default_readers() -> int:
    """One a processor that this process may use: with warm files, reading is bound by memory, not by waiting."""
    return min(MAX_READERS, len(os.sched_getaffinity(0)))


def run_all(jobs: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """work(job) for every job, begun in their order.  Raises the first error, once every thread has stopped.

    threads: 0 does it all in this one.
    """
    run_each(jobs, lambda: work, threads)


def run_each(jobs: Iterable[T], begin: Callable[[], Callable[[T], None]], threads: int) -> None:
    """As `run_all`, where every thread has a function of its own, which it gets from begin()."""
    if threads == 0:
        work = begin()
        for job in jobs:
            work(job)
        return
    queue, lock, errors = iter(jobs), Lock(), list[BaseException]()

    def run() -> None:
        try:
            work = begin()
            while not errors:
                with lock:
                    job = next(queue, None)
                if job is None:
                    return
                work(job)
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
            errors.append(error)

    started = [Thread(target=run, name=f"moebius-reader-{number}", daemon=True) for number in range(threads)]
    for thread in started:
        thread.start()
    try:
        for thread in started:
            thread.join()
    except BaseException as interrupt:
        errors.append(interrupt)
        for thread in started:
            thread.join()
        raise
    if errors:
        raise errors[0]
