"""The training loop: a Decoder, batches, a config. It knows nothing of where the decoder came from.

B sequences a step, T tokens a sequence, L MoE layers, E experts.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import MoebiusError
from moebius.layers.decoder import Decoder
from moebius.training.config import TrainingConfig, learning_rate_at
from moebius.training.loss import step_losses
from moebius.training.routing import RoutingCounts

Batches = Callable[[int], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    step: 0-based.  loss: the cross-entropy, in nats a token.  aux_loss: what was added to it for the experts' balance,
    coefficient included.  gradient_norm: the global L2 norm before clipping.  tokens: those predicted.
    seconds: wall time.
    """

    step: int
    loss: float
    aux_loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """records: one a step.  expert_load: [L, E] int64, how many tokens each layer sent to each expert in the run."""

    records: tuple[StepRecord, ...]
    expert_load: Tensor


def train(
    decoder: Decoder,
    batches: Batches,
    config: TrainingConfig,
    *,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainingResult:
    """Trains every parameter of `decoder` that requires a gradient, in place, with AdamW (1711.05101).

    batches: step -> input_ids [B, T] int64; every token but the first is predicted.  on_step: called after each step.
    Raises MoebiusError if the loss or a gradient stops being a finite number, before that step changes a weight.
    """
    optimizer = make_optimizer(decoder.parameters(), config)
    records: list[StepRecord] = []
    decoder.train()
    with RoutingCounts(decoder) as counts:
        for step in range(config.steps):
            records.append(_timed_step(decoder, optimizer, batches(step), config, step))
            if on_step is not None:
                on_step(records[-1])
    decoder.eval()
    return TrainingResult(tuple(records), counts.table())


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW. As is usual, weight decay spares vectors: norms and biases are scales and offsets, not maps."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def _timed_step(
    decoder: Decoder, optimizer: torch.optim.AdamW, input_ids: Tensor, config: TrainingConfig, step: int
) -> StepRecord:
    started = time.perf_counter()
    learning_rate = learning_rate_at(config, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss, aux_loss, gradient_norm = _step(decoder, optimizer, input_ids, config, step)
    tokens = input_ids.shape[0] * (input_ids.shape[1] - 1)
    return StepRecord(step, loss, aux_loss, gradient_norm, learning_rate, tokens, time.perf_counter() - started)


def _step(
    decoder: Decoder, optimizer: torch.optim.AdamW, input_ids: Tensor, config: TrainingConfig, step: int
) -> tuple[float, float, float]:
    """The cross-entropy, the weighted auxiliary loss and the gradient's norm, as in StepRecord."""
    optimizer.zero_grad(set_to_none=True)
    cross_entropy, balance = step_losses(decoder, input_ids, config.balance_scope)
    (cross_entropy if balance is None else cross_entropy + balance).backward()
    norm = clip_gradients(optimizer, config.max_grad_norm)
    loss, aux_loss, gradient_norm = cross_entropy.item(), 0.0 if balance is None else balance.item(), norm.item()
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise MoebiusError(
            f"step {step}: the loss is {loss}, its gradient's norm {gradient_norm}",
            advice="lower the learning rate, or look for a broken sample in this step's batch",
        )
    optimizer.step()
    return loss, aux_loss, gradient_norm


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scales all gradients down to a global L2 norm of `max_norm` (1211.5063, section 3.2); gives the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
