"""Runs cases one after the other, each under guard, and judges them."""

import gc
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

from moebius import checkpoint, open_checkpoint
from moebius.checkpoint.loading import LoadOptions
from tests.fuzz.bases import bases
from tests.fuzz.cases import Case, Damaged, damaged, smaller
from tests.fuzz.guards import SECONDS, TooLongError, Watch, standing, time_limit
from tests.fuzz.oracle import Loaded, Verdict, finding, judge_error, judge_load
from tests.fuzz.places import Place

BUSY = 5.0  # times as long as by itself may a case take on a machine that others use
GROWTH_BYTES = 256 << 20  # of the process, by one case

Subject = Callable[[Path, Case], Loaded]


def open_and_load(folder: Path, case: Case) -> Loaded:
    """What is fuzzed: the plan and, if it can be made, the weights."""
    opened = open_checkpoint(folder, dtype=case.wanted)
    options = LoadOptions(loading=case.loading, mapping=case.mapping)  # pyright: ignore[reportArgumentType]
    return Loaded(opened.config, checkpoint.load(opened.plan, options=options))


def warm_up(place: Place) -> None:
    """Every base once, so that what is imported late is there before anybody watches."""
    runner = Runner(place, seconds=120)
    for base, wanted, mapping in product(bases(), (None, "bfloat16"), ("auto", "never")):
        verdict = runner.run(Case(base.name, (), wanted, "async", mapping))
        assert verdict.outcome == "loaded", f"{base.name}: {verdict.detail}"


class Runner:
    """Runs cases in one place.

    seconds: for one case.  subject: opens a folder; another one than Moebius shows that the judge sees faults.
    """

    def __init__(
        self,
        place: Place,
        watch: Watch | None = None,
        *,
        seconds: float = SECONDS,
        subject: Subject = open_and_load,
    ):
        self._place, self._watch, self._seconds, self._subject = place, watch, seconds, subject

    def run(self, case: Case) -> Verdict:
        """A case that took too long is given a second chance, in which its own time counts: the machine may be busy."""
        verdict = self._judged(case, damage := damaged(case), self._seconds)
        if "TooLongError" not in verdict.detail:
            return verdict
        before = time.process_time()
        again, spent = self._judged(case, damage, BUSY * self._seconds), time.process_time() - before
        return verdict if spent > self._seconds else again

    def smallest(self, case: Case) -> Case:
        """The case with as few steps as still give a finding."""
        for less in smaller(case):
            if self.run(less).is_finding:
                return self.smallest(less)
        return case

    def _judged(self, case: Case, damage: Damaged, seconds: float) -> Verdict:
        self._place.hold(damage.files)
        before, peak = standing(), _peak_bytes()
        verdict = self._opened(case, damage, seconds)
        if verdict.is_finding:
            return verdict
        return self._left_behind(before, peak) or verdict

    def _opened(self, case: Case, damage: Damaged, seconds: float) -> Verdict:
        try:
            loaded = self._guarded(case, seconds)
        except (Exception, TooLongError) as error:  # noqa: BLE001  # whatever comes is judged
            return judge_error(error, damage.files, case.base, damage.touched, damage.harmless)
        return judge_load(loaded, damage.files, case.base, case.wanted, damage.harmless)

    def _guarded(self, case: Case, seconds: float) -> Loaded:
        with time_limit(seconds):
            try:
                self._listen(True)
                return self._subject(self._place.folder, case)
            finally:
                self._listen(False)

    def _listen(self, on: bool) -> None:
        if self._watch:
            self._watch.on = on

    def _left_behind(self, before: tuple[int, int, int], peak: int) -> Verdict | None:
        if self._watch and self._watch.seen:
            seen, self._watch.seen = self._watch.seen, []
            return finding(f"the process did what opening must not do: {seen[:3]}")
        if changes := self._place.changes():
            return finding(f"files were changed: {changes}")
        if standing() != before:
            gc.collect()
        if (after := standing()) != before:
            return finding(f"threads, open files, processes: {before} before, {after} after")
        grown = _peak_bytes() - peak
        return finding(f"memory: {grown:,} bytes more at its peak") if grown > GROWTH_BYTES else None


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
