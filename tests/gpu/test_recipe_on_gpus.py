"""On two GPUs: the published recipe as torchrun starts it, and a rank that is killed: the job ends, and says why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM
from tests.model_folders import saved_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 20.0  # seconds that ranks wait for one another
START = 40  # more, in which they import libraries, load, and end
SCRIPT = """
import os, signal, sys, torch
from moebius import AutoModelForCausalLM, DistributedConfig

config = DistributedConfig(enable_expert_parallel=True, timeout_seconds=float(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32", distributed_config=config)
ids = torch.tensor([[3, 4, 5]], device=model.device)
model.generate(ids, max_new_tokens=2)
forwards = 0

def die(*_):
    global forwards
    forwards += 1
    if forwards == 5 and sys.argv[3] == "within a step":
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    model.model.layers[1].register_forward_pre_hook(die)
if sys.argv[3] == "between steps" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
line = " ".join(map(str, model.generate(ids, max_new_tokens=12)[0, 3:].tolist()))
os.write(1, f"{line}\\n".encode())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = saved_model(tmp_path_factory.mktemp("hub") / "model", "qwen3_moe", seed=0, num_experts=5)
    (place.parent / "script.py").write_text(SCRIPT)
    return place


def command(folder: Path, killed: str) -> list[str]:
    return [str(folder.parent / "script.py"), str(folder), str(LIMIT), killed]


def test_the_recipe_gives_the_tokens_of_one_gpu_on_every_rank(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map="cuda")
    ids = torch.tensor([[3, 4, 5]], device="cuda")
    expected = " ".join(map(str, model.generate(ids, max_new_tokens=12)[0, 3:].tolist()))
    done = subprocess.run([*TORCHRUN, *command(folder, "no")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected] * 2


@pytest.mark.parametrize("killed", ["between steps", "within a step"])
def test_torchrun_ends_a_job_whose_rank_was_killed_and_names_it(folder, killed):
    begin = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, *command(folder, killed)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert time.monotonic() - begin < LIMIT + START
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(("killed", "said"), [("between steps", "rank 0: "), ("within a step", "operation timeout")])
def test_without_torchrun_the_rank_that_is_left_ends_by_itself(folder, killed, said):
    """Within a step it is NCCL's watchdog that ends it, in its own words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    begin = time.monotonic()
    with (
        started(folder, killed, place, 1, subprocess.DEVNULL),
        started(folder, killed, place, 0, subprocess.PIPE) as left,
    ):
        try:
            out, err = left.communicate(timeout=LIMIT + START + 20)
        finally:
            left.kill()
    assert left.returncode != 0
    assert time.monotonic() - begin < LIMIT + START
    assert said in err
    assert not out


def started(folder: Path, killed: str, place: dict[str, str], rank: int, output: int) -> subprocess.Popen[str]:
    variables = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    words = [sys.executable, *command(folder, killed)]
    return subprocess.Popen(words, env=variables, stdout=output, stderr=output, text=True)
