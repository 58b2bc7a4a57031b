"""generate, chat and env: the same tokens as the library gives, text on stdout, the rest on stderr."""

import io
import json

import pytest
import torch

from moebius.auto import AutoModelForCausalLM
from moebius.cli.runtime import sampling_options
from moebius.tokenizer import AutoTokenizer


def test_ids_in_ids_out_needs_no_tokenizer(moebius, model):
    ended = moebius("generate", model, "--ids", "1, 2 3", "-n", 6)
    expected = AutoModelForCausalLM.from_pretrained(model).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6)
    assert ended.out == " ".join(map(str, expected[0, 3:].tolist())) + "\n"
    assert "6 tokens at" in ended.err
    assert "experts: grouped_mm" in ended.err


def test_text_is_streamed_to_stdout_and_equals_the_decoded_ids(moebius, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("the expert", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "seed": 5}
    expected = AutoModelForCausalLM.from_pretrained(model).generate(ids, **options)
    flags = ("-p", "the expert", "-n", 12, "--temperature", 0.9, "--seed", 5)
    ended = moebius("generate", model, *flags)
    assert ended.out == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert "seed 5\n" in ended.err
    report = json.loads(moebius("generate", model, *flags, "--json").out)
    assert report["text"] == ended.out[:-1]
    assert (report["tokens"], report["prompt_tokens"], report["seed"]) == (12, ids.shape[1], 5)


def test_a_drawn_seed_is_shown_and_brings_the_text_back(moebius, model):
    first = moebius("generate", model, "-p", "a", "-n", 20, "--temperature", 2)
    seed = next(line.split()[1] for line in first.err.splitlines() if line.startswith("seed "))
    again = moebius("generate", model, "-p", "a", "-n", 20, "--temperature", 2, "--seed", seed)
    assert again.out == first.out


def test_a_greedy_answer_shows_no_seed(moebius, model):
    assert "seed" not in moebius("generate", model, "-p", "a", "-n", 2).err
    assert "seed" not in moebius("generate", model, "-p", "a", "-n", 2, "--temperature", 0).err


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({}, {}),
        ({"temperature": None, "top_k": 5}, {"top_k": 5, "do_sample": True}),
        ({"temperature": 0.0, "top_p": None}, {"do_sample": False}),
    ],
)
def test_sampling_flags_ask_for_sampling_and_a_temperature_of_0_for_none(flags, options):
    assert sampling_options(**flags) == options


def test_quiet_says_nothing_but_the_text(moebius, model):
    assert moebius("generate", model, "-p", "a", "-n", 2, "-q").err == ""


def test_a_dash_reads_the_prompt_from_stdin(moebius, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the expert"))
    piped = moebius("generate", model, "-p", "-", "-n", 5)
    assert piped.out == moebius("generate", model, "-p", "the expert", "-n", 5).out


def test_generation_ends_before_a_stop_text(moebius, model):
    whole = moebius("generate", model, "-p", "the expert", "-n", 20).out[:-1]
    stop = whole[4:6]
    assert (
        moebius("generate", model, "-p", "the expert", "-n", 20, "--stop", stop).out[:-1] == whole[: whole.find(stop)]
    )


def test_a_chat_template_is_used_unless_the_prompt_is_raw(moebius, model, chat_model):
    raw = moebius("generate", chat_model, "-p", "the expert", "-n", 4, "--raw", "--json")
    templated = moebius("generate", chat_model, "-p", "the expert", "-n", 4, "--json", "--system-prompt", "x")
    plain = moebius("generate", model, "-p", "the expert", "-n", 4, "--json")
    assert json.loads(raw.out)["prompt_tokens"] == json.loads(plain.out)["prompt_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.encode("<system>x<user>the expert<assistant>")
    assert json.loads(templated.out)["prompt_tokens"] == len(rendered)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ((), 2, "-p"),
        (("-p", "a", "--ids", "1"), 2, "one of the two"),
        (("--ids", "1 x"), 3, "'x'"),
        (("--ids", "512"), 3, "0 to 511"),
        (("-p", "a", "--system-prompt", "b"), 3, "chat template"),
        (("-p", "a", "--experts", "groupd_mm"), 3, "grouped_mm"),
        (("-p", "a", "--dtype", "int3"), 2, "bfloat16"),
        (("-p", "a", "-n", 0), 2, "max-tokens"),
        (("-p", "a", "--top-p", 1.5), 2, "top-p"),
        (("--ids", "1", "-n", 300), 3, "256"),
        (("--ids", "1 " + "9" * 30), 3, "9" * 30),
        (("--ids", "1 -3"), 3, "-3"),
    ],
)
def test_bad_input_is_refused_by_name(moebius, model, flags, code, said):
    ended = moebius("generate", model, *flags)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert "Traceback" not in ended.err


def chat(moebius, monkeypatch, model, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return moebius("chat", model, "-n", 5, *flags)


def test_a_conversation_is_kept_in_its_history(moebius, monkeypatch, chat_model, tmp_path):
    history = tmp_path / "turns.json"
    first = chat(moebius, monkeypatch, chat_model, ["hello", "", "again"], "--history", history, "--system-prompt", "x")
    assert first.code == 0
    turns = json.loads(history.read_text())
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert first.out == "".join(turn["content"] + "\n" for turn in turns if turn["role"] == "assistant")
    chat(moebius, monkeypatch, chat_model, ["more"], "--history", history)
    assert json.loads(history.read_text())[:5] == turns


def test_slash_commands(moebius, monkeypatch, chat_model, tmp_path):
    file = tmp_path / "saved.json"
    lines = ["hello", "/system be brief", "hi", f"/save {file}", "/save", "/nonsense", "/exit", "never read"]
    ended = chat(moebius, monkeypatch, chat_model, lines)
    assert ended.code == 0
    assert [turn["content"] for turn in json.loads(file.read_text())][:2] == ["be brief", "hi"]
    assert "/save needs a file" in ended.err
    assert "/nonsense is not a command" in ended.err
    assert ended.out.count("\n") >= 2


def test_a_save_that_fails_leaves_the_conversation(moebius, monkeypatch, chat_model, tmp_path):
    file = tmp_path / "saved.json"
    ended = chat(moebius, monkeypatch, chat_model, ["hello", f"/save {tmp_path}/no/such", f"/save {file}"], "-q")
    assert ended.code == 0
    assert ended.err.startswith(f"error: {tmp_path}/no/such")
    assert len(json.loads(file.read_text())) == 2


def test_a_history_that_cannot_be_written_is_refused_before_the_first_turn(moebius, monkeypatch, chat_model, tmp_path):
    ended = chat(moebius, monkeypatch, chat_model, ["hello"], "--history", tmp_path / "no" / "such")
    assert (ended.code, ended.out) == (1, "")
    assert "could not be saved" in ended.err


@pytest.mark.parametrize(("terminal", "code", "turns"), [(True, 0, 2), (False, 3, 0)])
def test_a_line_that_is_refused_ends_piped_input_alone(
    moebius, monkeypatch, chat_model, tmp_path, terminal, code, turns
):
    file = tmp_path / "turns.json"
    monkeypatch.setattr("moebius.cli.chat.is_terminal", lambda: terminal)
    ended = chat(moebius, monkeypatch, chat_model, ["word " * 300, "hello"], "--history", file)
    assert ended.code == code
    assert "256 positions" in ended.err
    assert len(json.loads(file.read_text())) == turns


def test_reset_forgets_the_turns(moebius, monkeypatch, chat_model, tmp_path):
    file = tmp_path / "saved.json"
    chat(moebius, monkeypatch, chat_model, ["hello", "/reset", f"/save {file}"])
    assert json.loads(file.read_text()) == []


def test_chat_without_a_template_is_refused(moebius, model):
    ended = moebius("chat", model)
    assert ended.code == 3
    assert "no chat template" in ended.err


def test_env_names_versions_devices_and_backends(moebius):
    report = json.loads(moebius("env", "--json").out)
    assert report["versions"]["torch"] == torch.__version__
    assert "cpu" in report["devices"]
    assert report["experts"]["eager on cpu"] == "can run"
    assert "experts\n" in moebius("env").out


def test_a_rank_takes_no_device_by_its_number_and_the_flag_is_named(moebius, model):
    ended = moebius("generate", model, "--ids", "3 4 5", "--ep-size", 1, "--device", "cuda:1")
    assert ended.code == 3
    assert "error: --device cuda:1: where ranks share the experts, expected 'auto', 'cpu' or 'cuda'" in ended.err
    assert "device_map" not in ended.err
