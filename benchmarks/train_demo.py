"""The demo's training loop beside transformers' model in a plain loop: the same tensors, batches and optimizer.

    python benchmarks/train_demo.py --threads 2 --rounds 7 --steps 40 --out benchmarks/train_demo.json

They take turns, a round each, so that a busy machine slows all. Prints a table of medians, writes all rounds as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM as PeerAutoModel
from transformers import Qwen3MoeConfig

from moebius.auto import AutoModelForCausalLM
from moebius.cli.demo.stages import BATCH_SIZE, MODEL, SEQ_LEN, tokens_of
from moebius.cli.demo.text import demo_text, train_tokenizer
from moebius.training.config import TrainingConfig, learning_rate_at
from moebius.training.data import TokenWindows
from moebius.training.trainer import make_optimizer, train

PEERS = ("grouped_mm", "eager")
CONFIG = TrainingConfig(
    steps=40, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, learning_rate=4e-3, warmup_steps=20, weight_decay=0.1
)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    config = replace(CONFIG, steps=options.steps)
    text = demo_text().training
    windows = TokenWindows(tokens_of(text, train_tokenizer(text)), BATCH_SIZE, SEQ_LEN)
    runs = runners(config, windows)
    losses = {name: run() for name, run in runs.items()}  # warms up, and shows that all do the same work
    speeds = measure(runs, options.rounds, config.steps * BATCH_SIZE * SEQ_LEN)
    report(options, speeds, losses)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/train_demo.json"))
    return parser.parse_args()


def runners(config: TrainingConfig, windows: TokenWindows) -> dict[str, Callable[[], list[float]]]:
    """name -> a round of training that gives its losses; all models begin with the same weights."""
    ours = AutoModelForCausalLM.from_config(MODEL, generator=torch.Generator().manual_seed(0))
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}

    def run_ours() -> list[float]:
        return [record.loss + record.aux_loss for record in train(ours, windows.batch, config).records]

    return {"moebius": run_ours} | {f"transformers {name}": run_peer(name, state, config, windows) for name in PEERS}


def run_peer(
    implementation: str, state: dict[str, torch.Tensor], config: TrainingConfig, windows: TokenWindows
) -> Callable[[], list[float]]:
    settings = {name: value for name, value in MODEL.items() if name not in ("model_type", "rope_theta")}
    peer_config = Qwen3MoeConfig(
        **settings,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL["rope_theta"]},
        output_router_logits=True,
    )
    peer = PeerAutoModel.from_config(peer_config, experts_implementation=implementation)
    peer.load_state_dict(state)
    peer.train()

    def run() -> list[float]:
        optimizer = make_optimizer(peer.parameters(), config)
        return [peer_step(peer, optimizer, windows.batch(step), config, step) for step in range(config.steps)]

    return run


def peer_step(
    peer: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, config: TrainingConfig, step: int
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step)
    optimizer.zero_grad(set_to_none=True)
    loss = peer(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), config.max_grad_norm)
    optimizer.step()
    return loss.item()


def measure(runs: dict[str, Callable[[], list[float]]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens a second of each round."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def report(options: argparse.Namespace, speeds: dict[str, list[float]], losses: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(rounds) for name, rounds in speeds.items()}
    print(f"{'loop':<26}{'median tok/s':>14}{'best':>10}{'last loss of round 0':>24}")
    for name, median in medians.items():
        print(f"{name:<26}{median:>14,.0f}{max(speeds[name]):>10,.0f}{losses[name][-1]:>24.5f}")
    peer = max(median for name, median in medians.items() if name != "moebius")
    print(f"moebius is {medians['moebius'] / peer:.2f} times as fast as the faster transformers loop")
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    machine = {"machine": platform.machine(), "threads": options.threads}
    result = {"date": date.today().isoformat(), **machine, **versions, "steps": options.steps}
    options.out.write_text(json.dumps(result | {"tokens_per_second": speeds, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
