"""Our experts inside a model of transformers: the prefill by its own grouped_mm, and by ours after `register()`.

B sequences (here one), S tokens of a sequence.
"""

import statistics
from typing import Any

import torch

from moebius.bench.checkpoints import QWEN3_30B_A3B
from moebius.bench.experts_clocks import clock_of

LAYERS, TOKENS = 4, 8192
IMPLEMENTATIONS = ("grouped_mm", "moebius")


def prefill(device: str, dtype: torch.dtype, rounds: int, tokens: int = TOKENS, **config: Any) -> dict[str, Any]:
    """An unmodified Qwen3-MoE of random weights reads `tokens` tokens; milliseconds, in turns, and their ratio.

    config: what differs from LAYERS layers of Qwen3-30B-A3B's shape.
    """
    from moebius.integrations.transformers import register

    register()
    model, clock = _model(device, dtype, {**QWEN3_30B_A3B, "num_hidden_layers": LAYERS, **config}), clock_of(device)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    logits: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds):
        for name in IMPLEMENTATIONS:
            model.set_experts_implementation(name)
            logits[name] = _last_logits(model, ids)  # untimed: what is compiled or packed, is
            seconds[name].append(clock.seconds(lambda: _last_logits(model, ids), 1))
    theirs, ours = (statistics.median(seconds[name]) for name in IMPLEMENTATIONS)
    difference = (logits["moebius"] - logits["grouped_mm"]).norm() / logits["grouped_mm"].norm()
    return {
        "model": f"Qwen3-MoE, {config.get('num_hidden_layers', LAYERS)} layers",
        "tokens": tokens,
        "transformers_ms": theirs * 1e3,
        "moebius_ms": ours * 1e3,
        "times_faster": theirs / ours,
        "logits_differ": difference.item(),
    }


def _model(device: str, dtype: torch.dtype, config: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    described = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**described), dtype=dtype).eval()


@torch.no_grad()
def _last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, logits_to_keep=1).logits.float()


def sentence(found: dict[str, Any]) -> str:
    times = f"transformers grouped_mm {found['transformers_ms']:.4g} ms, with moebius {found['moebius_ms']:.4g} ms"
    return f"{found['model']}, {found['tokens']} tokens at once: {times}: {found['times_faster']:.2f} times faster"
