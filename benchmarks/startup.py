"""How long a command takes to start: minimum of 9 processes each, Moebius and transformers in turns.

python benchmarks/startup.py
"""

import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import moebius": [sys.executable, "-c", "import moebius"],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "moebius --help": [str(BIN / "moebius"), "--help"],
    "moebius generate --help": [str(BIN / "moebius"), "generate", "--help"],
    "transformers --help": [str(BIN / "transformers"), "--help"],
    "from moebius import AutoModelForCausalLM": [sys.executable, "-c", "from moebius import AutoModelForCausalLM"],
    "from transformers import AutoModelForCausalLM": [
        sys.executable,
        "-c",
        "from transformers import AutoModelForCausalLM",
    ],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    best = {name: float("inf") for name in COMMANDS}
    for _ in range(9):
        for name, command in COMMANDS.items():
            best[name] = min(best[name], seconds(command))
    for name, value in best.items():
        print(f"{value:8.3f} s  {name}")


if __name__ == "__main__":
    main()
