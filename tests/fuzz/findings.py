"""Findings on disk: what was done, what came of it, and the files, so that it replays by one command."""

import base64
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Case, Step, damaged
from tests.fuzz.documents import Content, Link, Special
from tests.fuzz.oracle import Verdict
from tests.fuzz.places import write_all

KEPT = 3  # of one kind; more say the same
RECORD = "finding.json"


def kind_of(verdict: Verdict) -> str:
    """Findings of one kind differ in names and numbers only."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*|/\S+", "#", verdict.detail.split("\n")[0])[:120]


class Findings:
    """Counts findings by kind, and keeps the first few of each in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.kinds = Counter[str]()

    def wants(self, verdict: Verdict) -> bool:
        """Count it; is it one of the first of its kind?"""
        self.kinds[kind_of(verdict)] += 1
        return self.kinds[kind_of(verdict)] <= KEPT

    def keep(self, name: str, case: Case, verdict: Verdict) -> Path:
        """Writes the case; its files lie in `checkpoint`, pipes and links left out, which the record holds."""
        place = self._folder / name
        damage = damaged(case)
        write_all(place / "checkpoint", {key: item for key, item in damage.files.items() if isinstance(item, bytes)})
        record = {"detail": verdict.detail, "case": asdict(case), "damaged": _differing(case)}
        (place / RECORD).write_text(json.dumps(record, indent=1))
        return place


def replayed(path: Path) -> Case:
    """The case of a kept finding."""
    raw = json.loads((path / RECORD if path.is_dir() else path).read_text())["case"]
    return Case(**{**raw, "steps": tuple(Step(*step) for step in raw["steps"])})


def _differing(case: Case) -> dict[str, Any]:
    """The files that are not the base's."""
    files = damaged(case).files
    return {name: _spelled(item) for name, item in files.items() if case.base.files.get(name) != item}


def _spelled(content: Content) -> Any:
    match content:
        case bytes():
            return {"bytes": len(content), "head": base64.b64encode(content[:256]).decode()}
        case Link():
            return {"link": content.target}
        case Special():
            return {"special": content.kind}
