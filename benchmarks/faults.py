"""Every named checkpoint fault, on transformers and on Moebius in one run: what loads, what is refused, how clearly.

    python -m benchmarks.faults --out docs/faults.md

Run from the repository's root, in the test environment.
"""

import argparse
import logging
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import moebius
from tests.checkpoint.faults import FAULTS, NamedFault, Names, make_clean

COMMAND = "python -m benchmarks.faults --out docs/faults.md"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
INPUT_IDS = torch.arange(24)[None]

LINES, WIDTH = 3, 160

NOTES = {
    "5": "; refused by `check_tensors=True` if the folder was saved with `checksums=True`",
    "37": "; a pickle is never opened",
}

HEAD = """# Damaged checkpoints

What happens when a checkpoint's files are not what they should be. Each fault was done to a copy of one small Qwen3-MoE
(float32, four experts, two layers, four shards and an index, written by transformers), and the copy given to
`AutoModelForCausalLM.from_pretrained` of both libraries in one run.

    {command}

{date}; transformers {transformers}, moebius {moebius}, torch {torch}. The corpus is `tests/checkpoint/faults.py`;
`tests/checkpoint/test_faults.py` holds Moebius to its column.

- *refused* is an error of the library's own kinds before a model is returned; for Moebius, before a weight is read.
  *names N of M*: how many of the names that a reader needs (the file and the tensor, or the config field) stand in it,
  or in the report that transformers logs before it. The packed name of a whole layer's experts does not say which one.
- *loads* gives a model. *Other logits*: not those of the undamaged checkpoint. *Silent*: no error, no warning.

Moebius refuses what it cannot load faithfully, and tells every fault that the headers show in one error. What it lets
through today: a bit flipped in the data (row 5) changes no header, and these files carry no checksums. NaN (row 18)
is looked for with `check_tensors=True`, which is off by default because it goes over every weight once more.
"""

MESSAGES = f"""
## The messages

What transformers says is cut to {LINES} lines of {WIDTH} characters; what Moebius says is whole.
"""


@dataclass
class Outcome:
    """error: what was raised, and at which step.  warned: all that was logged or warned meanwhile."""

    step: str = ""
    error: Exception | None = None
    warned: list[str] = field(default_factory=list)
    logits: torch.Tensor | None = None

    def in_words(self, names: Names, clean: torch.Tensor) -> str:
        if self.error is not None:
            return self._refusal(names)
        same = self.logits is not None and torch.equal(self.logits, clean)
        tone = "with a warning" if self.warned else "silent"
        return f"loads, {tone}, {'same logits' if same else '**other logits**'}"

    @property
    def text(self) -> str:
        """All that the user is told: the error, and what was logged before it."""
        said = [*self.warned, *([str(self.error)] if self.error else [])]
        return ANSI.sub("", "\n".join(said))

    def _refusal(self, names: Names) -> str:
        found = sum(name.removesuffix(".*") in self.text for name in names)
        verb = "refused" if self.step == "load" else "loads, fails at the first forward"
        return f"{verb}: {type(self.error).__name__}, names {found} of {len(names)}"


class Listener(logging.Handler):
    def __init__(self, heard: list[str]):
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def listening(heard: list[str]) -> Iterator[None]:
    """Collects what is logged or warned."""
    listener, loggers = Listener(heard), [logging.getLogger(name) for name in ("transformers", "moebius")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        heard.extend(str(warning.message) for warning in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


def attempt(load: Callable[..., Any], folder: Path, **options: Any) -> Outcome:
    """Loads and runs the model; whatever is raised is what is measured."""
    outcome = Outcome(step="load")
    with listening(outcome.warned), torch.no_grad():
        try:
            model = load(folder, experts_implementation="eager", **options)
            outcome.step = "forward"
            outcome.logits = model(INPUT_IDS).logits
        except Exception as error:  # noqa: BLE001
            outcome.error = error
    return outcome


@dataclass
class Row:
    fault: NamedFault
    names: Names
    folder: Path
    peer: Outcome
    ours: Outcome
    checked: Outcome  # ours with check_tensors=True

    def in_words(self, clean: torch.Tensor) -> str:
        """Our outcome."""
        words = self.ours.in_words(self.names, clean)
        if self.ours.error is None and self.checked.error is not None:
            words += f"; with `check_tensors=True` {self.checked.in_words(self.names, clean)}"
        return words + NOTES.get(self.fault.number, "")


def run(fault: NamedFault, clean: Path, scratch: Path) -> Row:
    folder = Path(shutil.copytree(clean, scratch / fault.number / "model"))
    names = fault.damage(folder)
    load = moebius.AutoModelForCausalLM.from_pretrained
    peer = attempt(transformers.AutoModelForCausalLM.from_pretrained, folder)
    return Row(fault, names, folder, peer, attempt(load, folder), attempt(load, folder, check_tensors=True))


def message(row: Row) -> str:
    """What both say; Moebius in full."""
    ours = row.ours if row.ours.error else row.checked
    lines = [
        f"### {row.fault.number}. {row.fault.title}\n",
        "```text\ntransformers:",
        shortened(row, row.peer.text) or "(nothing)",
    ]
    return "\n".join([*lines, "\nMoebius:", told(row, ours.text), "```\n"])


def told(row: Row, text: str) -> str:
    """The text without this run's paths."""
    return text.replace(str(row.folder), "FOLDER").replace(str(row.folder.parent), "PARENT")


def shortened(row: Row, text: str) -> str:
    lines = [line for line in told(row, text).splitlines() if line.strip("-+ ")]
    cut = [re.sub(" {2,}", "  ", line).strip()[:WIDTH] for line in lines[:LINES]]
    return "\n".join([*cut, *([f"... {len(lines) - LINES} more lines"] if len(lines) > LINES else [])])


def tally(name: str, outcomes: list[str]) -> str:
    """How often each verdict fell."""
    counts = Counter(words.split(";")[0].split(": ")[0] for words in outcomes)
    return f"- {name}: " + "; ".join(f"{count} {words}" for words, count in counts.most_common()) + "."


def report(rows: list[Row], clean: Outcome, clean_ours: Outcome) -> str:
    assert clean.logits is not None
    assert clean_ours.logits is not None
    versions = {module.__name__: module.__version__ for module in (transformers, moebius, torch)}
    peers = [row.peer.in_words(row.names, clean.logits) for row in rows]
    ours = [row.in_words(clean_ours.logits) for row in rows]
    lines = [
        f"| {row.fault.number} | {row.fault.title} | {peer} | {mine} |"
        for row, peer, mine in zip(rows, peers, ours, strict=True)
    ]
    told = [message(row) for row in rows if row.ours.error or row.checked.error]
    head = HEAD.format(command=COMMAND, date=date.today(), **versions)
    counts = [f"Of {len(rows)} cases:\n", tally("transformers", peers), tally("Moebius", ours), ""]
    table = [f"| # | fault | transformers {transformers.__version__} | Moebius |", "|---|---|---|---|", *lines]
    return "\n".join([head, *counts, *table, MESSAGES, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page there instead of printing it")
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        clean = make_clean(Path(scratch) / "clean")
        peer = attempt(transformers.AutoModelForCausalLM.from_pretrained, clean)
        ours = attempt(moebius.AutoModelForCausalLM.from_pretrained, clean)
        page = report([run(fault, clean, Path(scratch)) for fault in FAULTS], peer, ours)
    out.write_text(page) if out else print(page)


if __name__ == "__main__":
    main()
