"""The arrows of docs/architecture.md, read from the imports: a room imports only rooms below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moebius"

# From top to bottom; rooms of one line do not import each other.
LEVELS = (
    {"cli"},
    {"bench"},
    {"auto"},
    {"training", "generation"},
    {"models", "distributed"},
    {"checkpoint", "layers"},
    {"experts"},
    {"quantization"},
    {"config"},
)
OPEN_TO_ALL = {"errors", "tokenizer"}
# Parts of the front door, at its level.
FRONT = dict.fromkeys(
    (
        "arguments",
        "auto_tokenizer",
        "model_folder",
        "model_saving",
        "model_tensors",
        "on_ranks",
        "opening",
        "placement",
    ),
    "auto",
)
EXCEPTIONS = {
    "__main__": {"cli"},
    "integrations": {"experts", "quantization", "config"},
    "tokenizer": set(),
    "errors": set(),
}
TORCH_FREE = {
    "config.py",
    "errors.py",
    "placement.py",
    "checkpoint/files.py",
    "checkpoint/operations.py",
    "checkpoint/converter.py",
    "checkpoint/conversion.py",
    "checkpoint/planning.py",
    "checkpoint/owning.py",
    "checkpoint/sharing.py",
}


def room_of(module: str) -> str:
    """moebius.checkpoint.files -> checkpoint; the package itself has no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports anywhere; `from moebius import x` counts as moebius.x."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            whole = node.module or ""
            modules |= {f"{whole}.{alias.name}" for alias in node.names} if whole == "moebius" else {whole}
    return modules


def level_of(room: str) -> int:
    room = FRONT.get(room, room)
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


def allowed(room: str, other: str) -> bool:
    if other in ("", room) or other in OPEN_TO_ALL:
        return room != "errors" or other == room
    if room in EXCEPTIONS:
        return other in EXCEPTIONS[room]
    if {FRONT.get(room, room), FRONT.get(other, other)} == {"auto"}:
        return True
    if other == "integrations":
        return room == "bench"
    return level_of(room) < level_of(other) and (other != "bench" or room == "cli")


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def forbidden(path: Path, text_of=imports_of) -> set[str]:
    room = room_of(".".join(("moebius", *path.relative_to(PACKAGE).with_suffix("").parts)))
    ours = {module for module in text_of(path) if module.split(".")[0] == "moebius"}
    return {module for module in ours if not allowed(room, room_of(module))}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert not forbidden(path)


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_planning_and_config_import_no_torch(name):
    assert not {module for module in imports_of(PACKAGE / name) if module.split(".")[0] in ("torch", "numpy")}


@pytest.mark.parametrize(
    ("room", "other"),
    [
        ("experts", "layers"),
        ("experts", "distributed"),
        ("layers", "models"),
        ("checkpoint", "layers"),
        ("generation", "training"),
        ("models", "auto"),
        ("auto", "cli"),
        ("tokenizer", "config"),
        ("errors", "config"),
    ],
)
def test_an_arrow_that_points_up_or_sideways_is_found(room, other):
    assert not allowed(room, other)


def test_no_module_is_called_utils():
    assert not [path for path in files() if path.stem in ("utils", "helpers", "common", "misc")]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 420
