"""The training loop: a Decoder, batches, a config. It knows nothing of where the decoder came from.

B sequences a step, T tokens a sequence, L MoE layers, E experts.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.errors import MoebiusError
from moebius.layers.decoder import Decoder
from moebius.training.config import TrainingConfig, learning_rate_at
from moebius.training.loss import step_losses
from moebius.training.routing import RoutingCounts
from moebius.training.share import Share, share_of
from moebius.training.states import StateFolder

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
    states: StateFolder | None = None,
) -> TrainingResult:
    """Trains every parameter of `decoder` that requires a gradient, in place, with AdamW (1711.05101).

    batches: step -> input_ids [B, T] int64, on the decoder's device; every token but the first is predicted.
    on_step: called after each step.  states: where the run is written from time to time, and goes on from if there is
    something there already (see states.py).
    Where experts are spread over ranks, every rank calls this with the same batches; a batch that is not shared is
    divided by sequences.  Losses, norms and counts are those of the whole step on every rank; on_step is rank 0's.
    Raises MoebiusError if the loss or a gradient stops being a finite number, before that step changes a weight.
    """
    run = _Run(decoder, make_optimizer(decoder.parameters(), config), share_of(decoder), config)
    records: list[StepRecord] = []
    begin = states.resume(decoder, run.optimizer, config) if states else 0
    decoder.train()
    with RoutingCounts(decoder) as counts:
        for step in range(begin, config.steps):
            records.append(_timed_step(run, batches(step), step))
            if on_step is not None and run.share.speaks:
                on_step(records[-1])
            if states and states.due(step + 1, config):
                states.save(decoder, run.optimizer, config, step + 1)
    decoder.eval()
    return TrainingResult(tuple(records), run.share.pooled(counts.table()))


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW. As is usual, weight decay spares vectors: norms and biases are scales and offsets, not maps."""
    groups: dict[tuple[bool, type], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:  # what FSDP2 shards is of another type; one update takes tensors of one
            groups.setdefault((parameter.ndim > 1, type(parameter.data)), []).append(parameter)
    decayed = [
        {"params": found, "weight_decay": config.weight_decay if matrices else 0.0}
        for (matrices, _), found in groups.items()
    ]
    return torch.optim.AdamW(decayed, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


class _Run(NamedTuple):
    decoder: Decoder
    optimizer: torch.optim.AdamW
    share: Share
    config: TrainingConfig


def _timed_step(run: _Run, input_ids: Tensor, step: int) -> StepRecord:
    started = time.perf_counter()
    learning_rate = learning_rate_at(run.config, step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    loss, aux_loss, gradient_norm = _step(run, input_ids, step)
    tokens = input_ids.shape[0] * (input_ids.shape[1] - 1)
    return StepRecord(step, loss, aux_loss, gradient_norm, learning_rate, tokens, time.perf_counter() - started)


def _step(run: _Run, input_ids: Tensor, step: int) -> tuple[float, float, float]:
    """The cross-entropy, the weighted auxiliary loss and the gradient's norm, as in StepRecord."""
    run.optimizer.zero_grad(set_to_none=True)
    losses = _losses(run, input_ids)
    losses.sum().backward()
    norm = run.share.clip(run.config.max_grad_norm)
    (loss, aux_loss), gradient_norm = run.share.pooled(losses.detach()).tolist(), norm.item()
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise MoebiusError(
            f"step {step}: the loss is {loss}, its gradient's norm {gradient_norm}",
            advice="lower the learning rate, or look for a broken sample in this step's batch",
        )
    run.optimizer.step()
    return loss, aux_loss, gradient_norm


def _losses(run: _Run, input_ids: Tensor) -> Tensor:
    """[2] float32: what this process's sequences add to the step's cross-entropy and to its auxiliary loss."""
    rows = run.share.rows(input_ids)
    cross_entropy, balance = step_losses(run.decoder, rows, run.config.balance_scope, run.share.pooled)
    nothing = torch.zeros_like(cross_entropy)
    return torch.stack([run.share.part(cross_entropy, rows), nothing if balance is None else balance])
