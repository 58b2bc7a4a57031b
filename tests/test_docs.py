"""What the documents show runs as it stands."""

import re
import runpy
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
