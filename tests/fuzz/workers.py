"""Processes that run cases, and one that watches them: a case that ends its process, or holds it, is a finding too."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.cases import case_of
from tests.fuzz.findings import Findings, replayed
from tests.fuzz.guards import Watch, memory_limit
from tests.fuzz.oracle import Verdict, finding
from tests.fuzz.places import Place
from tests.fuzz.running import Runner, warm_up

STUCK_SECONDS = 60.0  # a case that no signal interrupts
Report = Callable[[int, float], None]


@dataclass
class Summary:
    """outcomes: how many cases were refused, loaded, or findings.  damages: (mutation, outcome) of cases with one."""

    outcomes: Counter[str] = field(default_factory=Counter)
    damages: Counter[tuple[str, str]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Summary") -> None:
        self.outcomes += other.outcomes
        self.damages += other.damages
        self.kinds += other.kinds


def work(seed: int, numbers: Sequence[int], folder: Path, done: Any, results: Any) -> None:
    """The life of one process.  done: how many of the numbers are behind it.  results: takes the Summary."""
    torch.set_num_threads(1)
    summary, findings = Summary(), Findings(folder)
    with Place() as place:
        warm_up(place)
        runner = Runner(place, Watch())
        with memory_limit():
            for count, number in enumerate(numbers):
                done.value = count
                _run(seed, number, runner, summary, findings)
    done.value = len(numbers)
    summary.kinds = findings.kinds
    results.send(summary)


def _run(seed: int, number: int, runner: Runner, summary: Summary, findings: Findings) -> None:
    case = case_of(seed, number)
    verdict = runner.run(case)
    summary.outcomes[verdict.outcome] += 1
    if len(case.steps) == 1:
        summary.damages[case.steps[0].mutation, verdict.outcome] += 1
    if verdict.is_finding and findings.wants(verdict):
        findings.keep(f"{seed}-{number}", runner.smallest(case), verdict)


def run_all(seed: int, numbers: Sequence[int], jobs: int, folder: Path, report: Report) -> Summary:
    """Runs all cases in `jobs` processes."""
    started, total = time.monotonic(), Summary()
    crew = [_Worker(seed, numbers[at::jobs], folder) for at in range(jobs)]
    while not all(worker.finished(total) for worker in crew):
        time.sleep(0.2)
        report(sum(worker.count for worker in crew), time.monotonic() - started)
    return total


class _Worker:
    """One process and what is left for it; it is replaced when a case ends it."""

    def __init__(self, seed: int, numbers: Sequence[int], folder: Path):
        self._seed, self._numbers, self._folder = seed, numbers, folder
        self._before = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._results, theirs = context.Pipe(duplex=False)
        self._done: Any = context.Value("q", 0)
        left = self._numbers[self._before :]
        self._process = context.Process(target=work, args=(self._seed, left, self._folder, self._done, theirs))
        self._process.start()
        theirs.close()
        self._seen, self._since = -1, time.monotonic()

    @property
    def count(self) -> int:
        return self._before + self._done.value

    def finished(self, total: Summary) -> bool:
        """Is there nothing left to do?  Takes over what the process reports."""
        if self._results.closed:
            return True
        if self._results.poll():
            return self._take(total)
        if not self._process.is_alive() or self._stuck():
            self._lost(total)
        return False

    def _take(self, total: Summary) -> bool:
        try:
            total.add(self._results.recv())
        except EOFError:  # it died; what it had counted is lost, and said to be
            self._lost(total)
            return False
        self._process.join()
        self._results.close()
        return True

    def _stuck(self) -> bool:
        if self._done.value != self._seen:
            self._seen, self._since = self._done.value, time.monotonic()
        return time.monotonic() - self._since > STUCK_SECONDS

    def _lost(self, total: Summary) -> None:
        self._process.kill()
        self._process.join()
        number = self._numbers[min(self.count, len(self._numbers) - 1)]
        verdict = finding(f"the process ended with {self._process.exitcode}, or stood still; case {number}")
        Findings(self._folder).keep(f"{self._seed}-{number}", case_of(self._seed, number), verdict)
        total.outcomes += Counter(finding=1, uncounted=self._done.value)
        total.kinds[verdict.detail] += 1
        self._before = self.count + 1
        self._start()


def judged_again(path: Path) -> Verdict:
    """A kept finding, run once more in this process, under guard."""
    with Place() as place:
        warm_up(place)
        return Runner(place, Watch()).run(replayed(path))
