"""How long a save takes, and how much memory, beside transformers' save_pretrained.

python benchmarks/save.py FOLDER [--rounds 5] [--layers 1] [--output benchmarks/save.json]

FOLDER gets a checkpoint of the shape of Qwen3-30B-A3B with few layers (made once), and a copy that every save writes
anew.  Every save is a process of its own, on two threads, in turns: loaded, saved, measured.  Ours is on the disk when
it returns; transformers leaves that to the system, so its time is given up to its return and up to the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
WAYS = ("Moebius, mapped", "Moebius, copied", "Moebius, checksums", "transformers")


# --- in a process of its own -----------------------------------------------------------------------------------------


def make(folder: Path, layers: int) -> None:
    from moebius import AutoModelForCausalLM

    config = CONFIG | {"num_hidden_layers": layers}
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measure(way: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds and bytes of one save; the target's older files are replaced."""
    save = loaded(way, source)
    before, peak = anonymous_bytes(), Peak()
    with peak:
        started, busy = time.perf_counter(), time.process_time()
        save(target)
        busy = time.process_time() - busy
        returned = time.perf_counter() - started
        flush(target)
        flushed = time.perf_counter() - started
    return {"returned_s": returned, "on_disk_s": flushed, "cpu_s": busy, "extra_bytes": peak.nbytes - before}


def loaded(way: str, source: Path) -> Any:
    """A function that saves the model to a folder."""
    import torch

    torch.set_num_threads(2)
    if way == "transformers":
        import transformers

        transformers.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained
    from moebius import AutoModelForCausalLM, checkpoint

    model = AutoModelForCausalLM.from_pretrained(source, mapping="never" if way.endswith("copied") else "auto")
    if way.endswith("checksums"):
        tensors = dict(model.named_parameters())
        return lambda target: checkpoint.save(model.plan, tensors, target, checksums=True)
    return model.save_pretrained


class Peak:
    """The most anonymous memory that this process has while the block runs."""

    def __init__(self) -> None:
        self.nbytes, self._over = 0, threading.Event()
        self._watch = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(0.005):
            self.nbytes = max(self.nbytes, anonymous_bytes())

    def __enter__(self) -> None:
        self.nbytes = anonymous_bytes()
        self._watch.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# --- the rounds ------------------------------------------------------------------------------------------------------


def child(*args: str) -> str:
    command = [sys.executable, __file__, "--child", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def warm(folder: Path) -> None:
    """The source's pages are in memory, and nothing waits to be written."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    os.sync()


def rounds(folder: Path, count: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(count):
        for way in WAYS:
            shutil.rmtree(folder / "copy", ignore_errors=True)
            warm(folder / "source")
            found[way].append(json.loads(child(way, str(folder / "source"), str(folder / "copy")).splitlines()[-1]))
    return found


def show(found: dict[str, list[dict[str, float]]], nbytes: int) -> None:
    print(f"{nbytes / 1e9:.2f} GB; medians of {len(found[WAYS[0]])}")
    print(f"{'':22}{'returned':>10}{'on disk':>10}{'GB/s':>7}{'processors':>12}{'extra memory':>15}")
    for way, runs in found.items():
        keys = ("returned_s", "on_disk_s", "cpu_s", "extra_bytes")
        back, disk, busy, extra = (statistics.median(run[key] for run in runs) for key in keys)
        print(f"{way:22}{back:8.2f} s{disk:8.2f} s{nbytes / disk / 1e9:7.2f}{busy:10.2f} s{extra / 2**20:11.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    source = given.folder / "source"
    if not source.exists():
        child("make", str(source), str(given.layers))
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    found = rounds(given.folder, given.rounds)
    show(found, nbytes)
    if given.output:
        given.output.write_text(json.dumps({"bytes": nbytes, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, source, target = sys.argv[2:]
        if what == "make":
            make(Path(source), int(target))
        else:
            print(json.dumps(measure(what, Path(source), Path(target))))
    else:
        main()
