"""Progress bars on stderr. They are for people: without a terminal there are none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moebius.cli.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class LoadingBar:
    """The loader's progress, in bytes: start, advance, finish."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=_stderr(),
            transient=True,
        )
        self._task: TaskID | None = None

    def start(self, total_bytes: int, label: str) -> None:
        self._task = self._bar.add_task(label, total=total_bytes)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, nbytes)

    def finish(self) -> None:
        self._bar.stop()


def loading_bar(console: Console) -> LoadingBar | None:
    return LoadingBar() if console.bars else None


class StepReport:
    """Shows training steps: a bar with the loss where there is a terminal, else a line at every tenth of the run."""

    def __init__(self, console: Console, steps: int, bar: "Progress | None"):
        self._console = console
        self._steps = steps
        self._bar = bar
        self._task = bar.add_task("train", total=steps, loss=float("nan")) if bar else None

    def step(self, step: int, loss: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step + 1, loss=loss)
        elif (step + 1) % max(1, self._steps // 10) == 0 or step == 0:
            self._console.note(f"  step {step + 1:>5} of {self._steps}   loss {loss:.3f}")


@contextmanager
def training_report(console: Console, steps: int) -> Iterator[StepReport]:
    if not console.bars:
        yield StepReport(console, steps, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn(), console=_stderr(), transient=True) as bar:
        yield StepReport(console, steps, bar)


def _stderr():
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True)
