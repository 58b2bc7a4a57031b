"""How a training run goes, as data: one frozen dataclass, no torch. Python, TOML and the command line share it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moebius.errors import ArgumentError, Fault

Schedule = Literal["cosine", "constant"]
BalanceScope = Literal["pooled", "layer", "none"]


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of one run.

    steps: optimizer steps.  batch_size: sequences a step.  seq_len: tokens a sequence.
    learning_rate: the peak, reached after `warmup_steps` of linear growth.  schedule: "cosine" falls to zero at the end
    of the run, "constant" stays.  max_grad_norm: gradients are scaled down to this global L2 norm.
    balance_scope: the auxiliary loss that keeps experts busy, times the decoder's router_aux_loss_coef: over all layers
    "pooled" (as transformers does), in each "layer" by itself, or "none".
    seed: names the order of the data.

    Raises ArgumentError that lists every field out of range.
    """

    steps: int
    batch_size: int = 1
    seq_len: int = 4096
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    balance_scope: BalanceScope = "pooled"
    seed: int = 0

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ArgumentError("the training settings are out of range", faults=faults)

    def _faults(self) -> Iterator[Fault]:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                yield Fault(name, "too small", f"expected at least 1, found {getattr(self, name)}")
        if self.seq_len < 2:
            yield Fault("seq_len", "too small", f"a next token needs at least 2, found {self.seq_len}")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                yield Fault(name, "negative", f"found {getattr(self, name)}")
        for name in ("learning_rate", "epsilon", "max_grad_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                yield Fault(name, "not a positive number", f"found {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Fault("betas", "out of range", f"expected two numbers in [0, 1), found {self.betas}")
        for name, choices in (("schedule", get_args(Schedule)), ("balance_scope", get_args(BalanceScope))):
            if getattr(self, name) not in choices:
                yield Fault(name, "unknown", f"expected {' or '.join(choices)}, found {getattr(self, name)!r}")


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """The learning rate of `step` (0-based): a pure function, so that no schedule has a state to save.

    Linear warmup, then half a cosine to zero (Loshchilov and Hutter, SGDR, 1608.03983, equation 5, without restarts).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
