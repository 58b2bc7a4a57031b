"""The published recipe and the command line, as torchrun starts them: real processes, gloo, CPU."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM
from moebius.cli.demo.text import train_tokenizer
from tests.model_folders import saved_model

BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
MOEBIUS = [sys.executable, "-m", "moebius"]
NEW = 8  # tokens

RECIPE = """
import os, sys, torch
from moebius import AutoModelForCausalLM, DistributedConfig

config = DistributedConfig(enable_expert_parallel=True, timeout_seconds=float(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", distributed_config=config)
ids = torch.tensor([[3, 4, 5]])
model.generate(ids, max_new_tokens=1)
if os.environ["RANK"] == sys.argv[3]:
    os._exit(9)
line = " ".join(map(str, model.generate(ids, max_new_tokens=8)[0, 3:].tolist()))
os.write(1, f"{line}\\n".encode())  # in one piece
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny qwen3_moe of five experts, random weights."""
    place = tmp_path_factory.mktemp("hub") / "model"
    return saved_model(place, "qwen3_moe", seed=0, num_experts=5, vocab_size=512)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    script = tmp_path_factory.mktemp("scripts") / "recipe.py"
    script.write_text(RECIPE)
    return script


def tokens_of_one_process(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=NEW)[0, 3:].tolist()
    assert len(tokens) == NEW
    return " ".join(map(str, tokens))


def environment(**more: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, **more}


def ended(command: list[object], **options) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=90, check=False, **options)


def test_the_recipe_gives_the_tokens_of_one_process_on_every_rank(folder, recipe):
    done = ended([*TORCHRUN, recipe, folder, 60, "none"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [tokens_of_one_process(folder)] * 2


def test_generate_under_torchrun_prints_once(folder):
    words = ["generate", folder, "--ids", "3 4 5", "-n", NEW, "--device", "cpu"]
    done = ended([*TORCHRUN, "--no-python", BIN / "moebius", *words])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [tokens_of_one_process(folder)]
    assert done.stderr.count("tokens at") == 1


def test_a_rank_that_is_killed_ends_the_others_with_a_clear_error(folder, recipe):
    """Two plain processes: nobody kills the one that is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [sys.executable, str(recipe), str(folder), "5", "1"]
    second = subprocess.Popen(words, env=environment(**place, RANK="1"))
    with subprocess.Popen(words, env=environment(**place, RANK="0"), stderr=subprocess.PIPE, text=True) as first:
        assert second.wait(60) == 9
        gone = time.monotonic()
        _, said = first.communicate(timeout=60)
    assert time.monotonic() - gone < 10
    assert first.returncode == 1
    assert "RankError: rank 0: generating: a rank of 2 went away, or did not come in time" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", [["generate", "--ids", "3 4 5"], ["inspect", "--check-tensors"]], ids=" ".join)
def test_a_shard_that_one_rank_finds_truncated_ends_all_with_one_message(folder, tmp_path, command):
    """Each rank is in a folder of its own, where the model's name is the same."""
    for rank in range(2):
        shutil.copytree(folder, tmp_path / str(rank) / "model")
    broken = 1 if command[0] == "generate" else 0  # inspect is rank 0's alone
    shard = min((tmp_path / str(broken)).rglob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 8)
    line = f'cd {tmp_path}/$RANK && exec {" ".join(MOEBIUS)} "$@"'
    done = ended([*TORCHRUN, "--no-python", "sh", "-c", line, "sh", command[0], "model", *command[1:]])
    assert done.returncode == 1  # torchrun's own
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if "truncated" in line
    ]
    assert done.stderr.count("truncated") == 1
    assert done.stderr.count("exitcode  : 3") >= 1


@pytest.mark.slow
def test_convert_under_torchrun_is_done_once(folder, tmp_path):
    done = ended([*TORCHRUN, "-m", "moebius", "convert", folder, tmp_path / "out", "--dtype", "bfloat16", "--json"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"folder"') == 2  # of the source, and of what was written: one report
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype.itemsize == 2


@pytest.mark.slow
def test_what_is_piped_in_is_read_once_and_told_to_all(folder):
    train_tokenizer("the expert of the layer; the router of the layer; " * 9).save_pretrained(folder)
    words = ["moebius", "generate", folder, "-p", "-", "-n", NEW, "-q"]
    done = ended([*TORCHRUN, "-m", *words], input="the layer of the router")
    alone = ended([sys.executable, "-m", *words], input="the layer of the router")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout != ""


@pytest.mark.slow
def test_chat_is_no_ranks(folder):
    done = ended([*TORCHRUN, "-m", "moebius", "chat", folder])
    assert done.stderr.count("error: moebius chat is one process's, and here are 2") == 1
