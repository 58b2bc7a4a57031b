"""python -m tests.fuzz: runs cases, or replays one."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.workers import Summary, judged_again, run_all

REPORT_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no findings.  1: some."""
    options = _parser().parse_args(arguments)
    if options.replay:
        verdict = judged_again(options.replay)
        print(f"{verdict.outcome}: {verdict.detail}")
        return int(verdict.is_finding)
    folder = options.findings or Path(tempfile.mkdtemp(prefix="moebius-findings-"))
    numbers = [options.case] if options.case is not None else range(options.count)
    started = time.monotonic()
    summary = run_all(options.seed, numbers, options.jobs, folder, _Progress(len(numbers)))
    _print(summary, time.monotonic() - started, options, folder)
    return int(bool(summary.kinds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Opens damaged checkpoints.")
    parser.add_argument("--count", type=int, default=2000, help="cases to run")
    parser.add_argument("--seed", type=int, default=0, help="of all choices; a case is a seed and its number")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", type=int, help="the one case of this number")
    parser.add_argument("--findings", type=Path, help="folder to which findings are written; a new one")
    parser.add_argument("--replay", type=Path, help="a finding's folder")
    return parser


class _Progress:
    def __init__(self, total: int):
        self._total, self._last = total, 0.0

    def __call__(self, done: int, seconds: float) -> None:
        if seconds - self._last >= REPORT_SECONDS:
            self._last = seconds
            print(f"{done:,} of {self._total:,}, {done / seconds:.0f} a second", file=sys.stderr, flush=True)


def _print(summary: Summary, seconds: float, options: argparse.Namespace, folder: Path) -> None:
    count = sum(summary.outcomes.values())
    print(f"seed {options.seed}: {count:,} cases in {seconds:.0f} s, {count / seconds:.0f} a second")
    print(", ".join(f"{number:,} {outcome}" for outcome, number in sorted(summary.outcomes.items())))
    for mutation in sorted({mutation for mutation, _ in summary.damages}):
        counted = (f"{summary.damages[mutation, outcome]:,} {outcome}" for outcome in ("refused", "loaded"))
        print(f"  {mutation} alone: {', '.join(counted)}")
    for kind, number in summary.kinds.most_common():
        print(f"FINDING, {number} times: {kind}")
    if summary.kinds:
        print(f"written to {folder}; again: python -m tests.fuzz --replay {folder}/<seed>-<case>")


if __name__ == "__main__":
    sys.exit(main())
