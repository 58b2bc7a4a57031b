"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import moebius

HEAVY = ("torch", "transformers", "triton", "numpy", "matplotlib", "huggingface_hub", "typer", "jinja2", "tokenizers")


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_moebius_imports_nothing_heavy():
    assert not imported_by("import moebius").intersection(HEAVY)


@pytest.mark.parametrize("module", ["files", "operations", "converter", "planning", "reversing", "atomic", "hub"])
def test_planning_a_checkpoint_needs_no_torch(module):
    assert not imported_by(f"import moebius.checkpoint.{module}").intersection(HEAVY)


def test_reading_a_config_needs_no_torch():
    assert not imported_by("from moebius.models import FAMILIES").intersection(HEAVY)


def test_the_model_class_brings_torch_but_no_oracle():
    modules = imported_by("from moebius import AutoModelForCausalLM")
    assert "torch" in modules
    assert not modules.intersection({"transformers", "matplotlib", "huggingface_hub", "typer"})


@pytest.mark.parametrize("name", moebius.__all__)
def test_every_public_name_is_there(name):
    assert getattr(moebius, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AutoModle'"):
        _ = moebius.AutoModle
