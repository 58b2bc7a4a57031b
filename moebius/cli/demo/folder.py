"""The demo's folder: what may be overwritten, and the names of what is in it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

MAKER = "moebius demo"


@dataclass(frozen=True)
class DemoFolder:
    """model/: the checkpoint and its tokenizer.  demo.json: times, figures, proofs; it marks the folder as ours."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "demo.json"

    def picture(self, name: str) -> Path:
        return self.path / f"{name}.png"

    def write_report(self, report: dict[str, Any]) -> None:
        self.report.write_text(json.dumps({"made_by": MAKER} | report, indent=2) + "\n")


def demo_folder(path: Path) -> DemoFolder:
    """A folder for a new run; a former run's model is removed. A usage error: the path holds anything else, or
    cannot be written.
    """
    folder = DemoFolder(path)
    if path.exists() and not (_is_empty(path) or _is_demo(folder)):
        raise typer.BadParameter(
            f"{path} is there already, and no former demo made it; nothing was written, give another folder",
            param_hint="--out",
        )
    try:
        _clear(folder)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be made or written: {error}", param_hint="--out") from error
    return folder


def _clear(folder: DemoFolder) -> None:
    if folder.model.exists():
        shutil.rmtree(folder.model)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_report({"finished": False})


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_demo(folder: DemoFolder) -> bool:
    try:
        return json.loads(folder.report.read_text()).get("made_by") == MAKER
    except (OSError, ValueError, AttributeError):
        return False
