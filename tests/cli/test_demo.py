"""The demo: whole, short; its proofs can fail; it overwrites nothing but itself."""

import json
import socket
import sys

import pytest
import torch

from moebius.cli.demo import pictures, stages
from moebius.cli.demo.folder import demo_folder
from moebius.cli.demo.proofs import logits_proof, skill_proof, tensors_proof, tokens_proof
from moebius.cli.demo.text import demo_text, library_sources, split_text, train_tokenizer

CLAIMS = {
    "held-out text was read",
    "every expert is in the file by itself",
    "every loaded parameter equals the trained one (sha256)",
    "logits before and after are the same",
    "the backends auto and eager generate the same tokens",
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the demo reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_whole_demo_runs_offline_and_proves_what_it_says(moebius, tmp_path, no_network):
    out = tmp_path / "demo"
    ended = moebius("demo", "--out", out, "--steps", 12)
    assert ended.code == 0, ended.err
    report = json.loads((out / "demo.json").read_text())
    assert report["finished"]
    assert set(report["proofs"]) == CLAIMS
    assert report["figures"]["loss"]["last"] < report["figures"]["loss"]["first"]
    assert {"model", "expert_load.png", "expert_load.json", "loss.png", "loss.json"} < {p.name for p in out.iterdir()}
    counts = json.loads((out / "expert_load.json").read_text())["counts"]
    assert {name: [len(table), len(table[0])] for name, table in counts.items()} == {
        "prose (held out)": [3, 8],
        "code": [3, 8],
    }
    assert "\N{ESCAPE}" not in ended.err  # no bars without a terminal
    assert "step    12 of 12" in ended.err


def test_a_former_demos_folder_is_used_again_without_its_model(tmp_path):
    folder = demo_folder(tmp_path / "demo")
    folder.model.mkdir()
    (folder.model / "old.safetensors").touch()
    folder.picture("loss").touch()
    assert demo_folder(tmp_path / "demo") == folder
    assert sorted(path.name for path in folder.path.iterdir()) == ["demo.json", "loss.png"]
    assert not json.loads(folder.report.read_text())["finished"]


def test_a_folder_of_somebody_elses_is_left_alone(moebius, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    ended = moebius("demo", "--out", tmp_path, "--steps", 1)
    assert ended.code == 2
    assert "no former demo made it" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def beneath_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "demo"


def with_a_linked_model(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "kept").touch()
    (folder / "demo").mkdir()
    (folder / "demo" / "demo.json").write_text('{"made_by": "moebius demo"}')
    (folder / "demo" / "model").symlink_to(folder / "elsewhere")
    return folder / "demo"


@pytest.mark.parametrize("obstacle", [beneath_a_file, with_a_linked_model])
def test_a_folder_that_cannot_be_written_is_refused_before_training(moebius, tmp_path, obstacle):
    ended = moebius("demo", "--out", obstacle(tmp_path), "--steps", 1)
    assert (ended.code, ended.out) == (2, "")
    assert "cannot be made or written" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "elsewhere").exists() or (tmp_path / "elsewhere" / "kept").exists()


def test_what_to_try_next_can_be_typed_as_it_stands(monkeypatch):
    def called(path, found):
        monkeypatch.setattr("sys.argv", [path])
        monkeypatch.setattr("shutil.which", lambda name: found)
        return stages.command_name()

    assert called("/usr/bin/moebius", "/usr/bin/moebius") == "moebius"
    assert called(".venv/bin/moebius", None) == ".venv/bin/moebius"
    assert called(".venv/bin/moebius", "/usr/bin/moebius") == ".venv/bin/moebius"
    assert called("moebius/cli/__main__.py", "/usr/bin/moebius") == f"{sys.executable} -m moebius.cli"


def test_a_proof_that_fails_ends_the_demo_with_an_error(moebius, tmp_path, monkeypatch):
    def spoil(run, trained, text, tokenizer):
        with torch.no_grad():
            trained.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 1e-6
        return load(run, trained, text, tokenizer)

    load = stages.load_model
    monkeypatch.setattr(stages, "load_model", spoil)
    ended = moebius("demo", "--out", tmp_path / "demo", "--steps", 1)
    assert ended.code == 1
    assert "proof failed: every loaded parameter equals the trained one (sha256): 34 of 35 equal" in ended.err
    assert not json.loads((tmp_path / "demo" / "demo.json").read_text())["finished"]


def test_proofs_fail_on_what_differs():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert not tensors_proof(first, second).holds  # pyright: ignore[reportArgumentType]
    assert tensors_proof(first, first).holds  # pyright: ignore[reportArgumentType]
    assert not tokens_proof(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])).holds
    assert not skill_proof(2.5, steps=900).holds
    assert skill_proof(1.8, steps=900).holds
    assert skill_proof(2.5, steps=20).holds


def test_the_smallest_difference_of_logits_is_seen(model):
    from moebius.auto import AutoModelForCausalLM

    first, second = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    input_ids = torch.arange(10)[None]
    assert logits_proof(first, second, input_ids).holds
    second.model.norm.weight.data[0] *= 1 + 1e-5
    assert not logits_proof(first, second, input_ids).holds


def test_held_out_text_shares_no_paragraph_with_the_training_text():
    documents = [f"shared\n\n{number}\n\nbefore {number // 2}" for number in range(200)]
    text = split_text("t", documents)
    training, held_out = (set(part.split("\n\n")) for part in (text.training, text.held_out))
    assert not training & held_out
    assert training | held_out == set("\n\n".join(documents).split("\n\n"))
    assert 0.1 < len(held_out) / len(training | held_out) < 0.15


def test_the_text_is_large_enough_and_the_same_every_time():
    text = demo_text()
    assert 250_000 < len(text.training) < 1_000_000
    assert text.sha256 == demo_text().sha256
    assert 2.0 < text.zlib_bits_per_byte < 3.0


def test_the_standard_library_stands_in_for_a_missing_reference():
    assert sum(map(len, library_sources(50_000))) == 50_000


def test_the_tokenizer_gives_any_text_back():
    tokenizer = train_tokenizer("the expert of the experts " * 20)
    text = "any bytes: \N{SNOWMAN} \t\n déjà"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id is not None


def test_without_matplotlib_the_numbers_are_written_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    pictures.draw_loss(tmp_path / "loss.png", [3.0, 2.0])
    assert json.loads((tmp_path / "loss.json").read_text())["losses"] == [3.0, 2.0]
    assert not (tmp_path / "loss.png").exists()
    assert "pip install" in pictures.HINT


def test_the_running_mean_looks_back_only():
    assert pictures.running_mean([4.0, 2.0, 0.0]) == [4.0, 3.0, 2.0]
    assert pictures.running_mean([1.0] * 30 + [26.0])[-1] == pytest.approx(2.0)
