"""What the documents show runs as it stands."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moebius import AutoModelForCausalLM
from tests.families import tiny_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#:]+)\)")


@pytest.fixture
def beside_a_demo_model(tmp_path, monkeypatch):
    """A working directory in which moebius-demo/model is a checkpoint with a tokenizer."""
    from tests.tokenizer_builders import byte_level_bpe

    folder = tmp_path / "moebius-demo" / "model"
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", vocab_size=512)).save_pretrained(folder)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    return folder


WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.name)
def test_python_in_documents_runs(path, beside_a_demo_model):
    names: dict = {"__name__": "document"}
    for block in BLOCK.findall(path.read_text()):
        exec(compile(block, path.name, "exec"), names)


def test_the_family_of_the_page_passes_what_the_page_has_it_pass(tmp_path):
    """Taken into a copy of the library as section 4 says: its file, the registry, its tiny config."""
    page = (ROOT / "docs" / "add_a_family.md").read_text()
    for name in ("moebius", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source, comparing = BLOCK.findall(page)
    (tmp_path / "moebius" / "models" / "dots1.py").write_text(source)
    registry = {"    deepseek_v3,\n": "    dots1,\n", "_BUILT_IN = (\n": "    dots1.FAMILY,\n"}
    put_after(tmp_path / "moebius" / "models" / "__init__.py", registry)
    (tiny,) = re.findall(r"^raw = (\{.*?^\})$", comparing, re.MULTILINE | re.DOTALL)
    put_after(tmp_path / "tests" / "families.py", {"TINY: dict[str, dict[str, Any]] = {\n": f'"dots1": {tiny},\n'})
    (command,) = re.findall(r"^python -m (pytest .*)$", page, re.MULTILINE)
    ran = [sys.executable, "-m", *command.split(), "-k", "dots1", "-p", "no:cacheprovider"]
    done = subprocess.run(ran, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split("[100%]")[0].count(".") > 20


def put_after(path: Path, lines: dict[str, str]) -> None:
    """Into a source file, after each of these lines."""
    text = path.read_text()
    for before, line in lines.items():
        assert text.count(before) == 1
        text = text.replace(before, before + line)
    path.write_text(text)


def test_the_readme_has_the_eight_lines_it_promises():
    (block,) = BLOCK.findall((ROOT / "README.md").read_text())
    assert len([line for line in block.splitlines() if line.strip()]) == 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    broken = [target for target in LINK.findall(path.read_text()) if not (path.parent / target).exists()]
    assert not broken


def test_the_tree_in_the_readme_is_the_tree():
    tree = (ROOT / "README.md").read_text().split("    moebius/\n")[1].split("## ")[0]
    inside = re.findall(r"[├└]── (\S+)", tree)
    beside = re.findall(r"^    (\w+)/", tree, re.MULTILINE)
    assert all((ROOT / "moebius" / name).exists() for name in inside)
    assert all((ROOT / name).is_dir() for name in beside)


@pytest.mark.parametrize(
    ("example", "arguments"),
    [("generate.py", ["moebius-demo/model", "The import statement"]), ("own_layout.py", [])],
)
def test_examples_run(example, arguments, beside_a_demo_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {"generate.py", "own_layout.py"}
