"""The command as a whole: quick to start, typos named, exit codes kept, quiet when nobody reads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moebius.cli.__main__ as cli
from moebius import __version__
from moebius.errors import CapacityError, CheckpointError, Fault

COMMAND = [sys.executable, "-m", "moebius.cli"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_version_is_the_packages(moebius):
    assert moebius("--version").out == f"moebius {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from moebius.cli.__main__ import run\n"
        f"assert run({arguments!r}) == 0\n"
        "heavy = {'torch', 'rich', 'numpy', 'transformers', 'huggingface_hub', 'jinja2', 'tokenizers', 'matplotlib'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["genrate", "x"], "generate"),
        (["generate", "x", "-p", "a", "--temprature", "1"], "--temperature"),
        (["inspect", "x", "--contx", "3"], "--ctx"),
    ],
)
def test_a_typo_is_usage_and_the_nearest_is_named(moebius, arguments, near):
    ended = moebius(*arguments)
    assert ended.code == 2
    assert near in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("--max_tokens", "--max-tokens"),
        ("--max_tokens=3", "--max-tokens=3"),
        ("--stop=a_b", "--stop=a_b"),
        ("a_b", "a_b"),
        ("-p", "-p"),
    ],
)
def test_underscores_in_names_are_hyphens_and_values_keep_theirs(word, read):
    assert cli.with_hyphens(["generate", word]) == ["generate", read]
    assert cli.with_hyphens(["generate", "--", word]) == ["generate", "--", word]


def failing_with(error):
    def command() -> None:
        raise error

    return {"fail": command, "other": lambda: None}


def test_an_error_of_ours_is_told_without_a_traceback_and_ends_with_its_code(moebius, monkeypatch):
    faults = [Fault("a.weight", "missing"), Fault("b.weight", "shape", "expected [2], found [3]")]
    monkeypatch.setattr(cli, "COMMANDS", failing_with(CheckpointError("2 faults", faults=faults, advice="fetch it")))
    ended = moebius("fail")
    assert ended.code == 3
    assert ended.err.startswith("error: 2 faults\n  a.weight: missing\n")
    assert "what to do: fetch it" in ended.err
    assert "Traceback" not in ended.err


def test_what_does_not_fit_ends_with_4(moebius, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", failing_with(CapacityError("too big")))
    assert moebius("fail").code == 4


def test_a_bug_keeps_its_traceback_and_says_how_to_report_it(moebius, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", failing_with(ZeroDivisionError("division by zero")))
    ended = moebius("fail")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "please report it" in ended.err
    assert "moebius env --json" in ended.err


def test_a_file_that_cannot_be_written_is_one_line(moebius, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", failing_with(PermissionError(13, "Permission denied", "there/loss.png")))
    ended = moebius("fail")
    assert (ended.code, ended.err) == (1, "error: there/loss.png: Permission denied\n")


def test_an_error_of_the_system_that_names_no_file_may_be_a_bug(moebius, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", failing_with(OSError("odd")))
    assert "please report it" in moebius("fail").err


def test_without_a_command_the_help_is_shown(moebius):
    ended = moebius()
    assert ended.code == 2
    assert "generate  Continue a prompt" in ended.out + ended.err


def test_numpy_is_imported_before_torch():
    # torch's C++ imports it too, and swallows a Ctrl-C that comes meanwhile
    code = (
        "import sys; from moebius.cli.__main__ import run\n"
        "class Order(list):\n"
        "    def find_spec(self, name, path=None, target=None): self.append(name)\n"
        "order = Order(); sys.meta_path.insert(0, order)\n"
        "run(['env', '--json'])\n"
        "assert order.index('numpy') < order.index('torch')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_an_interrupt_ends_with_130(moebius, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", failing_with(KeyboardInterrupt()))
    ended = moebius("fail")
    assert ended.code == 130
    assert "Traceback" not in ended.err


def test_an_interrupt_before_the_command_has_begun_ends_with_130_too(moebius, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_app", interrupted)
    assert moebius("env").code == 130


@pytest.fixture
def interruptible():
    """What this process ignores, as a shell's background job does, those that it starts would ignore too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_running_command_with_its_code_and_no_traceback(chat_model, number, code):
    process = subprocess.Popen(
        [*COMMAND, "chat", chat_model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        while "/exit ends" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.1)  # now it waits for a line
        process.send_signal(number)
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert "Traceback" not in errors


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_went_away_is_no_noise(model, buffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as closed_pipe:
        arguments = [*COMMAND, *(["--version"] if buffered else ["inspect", model, "--keys"])]
        ended = subprocess.run(arguments, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == ""


def test_the_page_of_the_command_line_is_up_to_date():
    ended = subprocess.run([sys.executable, "-m", "moebius.cli.reference"], capture_output=True, text=True, check=True)
    assert DOCUMENT.read_text() == ended.stdout, "write it anew: python -m moebius.cli.reference > docs/cli.md"
