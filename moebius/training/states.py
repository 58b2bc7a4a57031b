"""The state of a run on disk: weights and AdamW's moments, in one safetensors set that any number of ranks can read.

A tensor of the model `name` lies there whole as weights.<name>, its moments as exp_avg.<name> and exp_avg_sq.<name>;
each rank writes and reads its own rows.  training.json has the step and the settings.  The set that stood there is
replaced when the new one is complete, not before.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint import reversing
from moebius.checkpoint.owning import owned
from moebius.checkpoint.planning import Target
from moebius.checkpoint.reading import dtype_name
from moebius.errors import ArgumentError, CheckpointError, Fault
from moebius.layers.decoder import Decoder
from moebius.training.config import TrainingConfig

if TYPE_CHECKING:
    from moebius.distributed.spread import Spread

FILE, WEIGHTS, MOMENTS = "training.json", "weights", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateFolder:
    """path: the folder.  every: steps from one save to the next; 0 saves at the end of the run alone."""

    path: Path
    every: int = 0

    def due(self, done: int, config: TrainingConfig) -> bool:
        """Whether to save after so many steps."""
        return done == config.steps or bool(self.every and done % self.every == 0)

    def save(self, decoder: Decoder, optimizer: torch.optim.AdamW, config: TrainingConfig, done: int) -> None:
        """Writes the state after `done` steps; every rank calls it.  SaveError: what stood there is still there."""
        spread, tensors = _spread(decoder), dict(_state(decoder, optimizer))
        plan = reversing.from_nothing((), _targets(tensors, spread))
        checkpoint.save(
            plan,
            {name: _local(tensor, spread).detach() for name, tensor in tensors.items()},
            self.path,
            extra_files={FILE: json.dumps({"step": done, "settings": asdict(config)}, indent=2).encode()},
            team=spread and spread.ranks,
            boxes=_boxes(tensors, spread),
        )

    def resume(self, decoder: Decoder, optimizer: torch.optim.AdamW, config: TrainingConfig) -> int:
        """Fills decoder and optimizer from the folder; the steps done, 0 where there is nothing.

        ArgumentError: the run had other settings, `steps` aside.  CheckpointError: files that are not of this model, or
        that ranks have of other steps.
        """
        spread = _spread(decoder)
        with spread.ranks.together("resuming") if spread else nullcontext():
            done = self._steps_done(config)
        if spread and len(set(steps := spread.ranks.gathered(done, "resuming"))) > 1:
            raise CheckpointError(
                f"{self.path} has other steps on some ranks than on others: {', '.join(map(str, steps))}",
                advice="give a folder that all hosts see",
            )
        if done is None:
            return 0
        with spread.ranks.together("resuming") if spread else nullcontext():
            self._fill(decoder, optimizer, done, spread)
        return done

    def _fill(self, decoder: Decoder, optimizer: torch.optim.AdamW, done: int, spread: "Spread | None") -> None:
        _make_moments(optimizer, done)
        tensors = dict(_state(decoder, optimizer))
        plan = checkpoint.plan(checkpoint.open_files(self.path), (), _targets(tensors, spread))
        found = checkpoint.load(owned(plan, _boxes(tensors, spread)), device=next(decoder.parameters()).device)
        with torch.no_grad():
            for name, tensor in tensors.items():
                _local(tensor, spread).copy_(found[name])

    def _steps_done(self, config: TrainingConfig) -> int | None:
        """None: there is nothing."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        try:
            told = json.loads((self.path / FILE).read_text())
            done, settings = int(told["step"]), dict(told["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / FILE} is not a training state's: {error}") from error
        now = json.loads(json.dumps(asdict(config)))
        differ = [name for name in now if name != "steps" and settings.get(name) != now[name]]
        if differ:
            faults = [Fault(name, "other than before", f"{settings.get(name)}, now {now[name]}") for name in differ]
            raise ArgumentError(f"{self.path} is the state of another run", faults=faults)
        return done


def _state(decoder: Decoder, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the state, by the names that they have in the files."""
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        yield f"{WEIGHTS}.{name}", tensor
        for moment in MOMENTS:
            if moment in optimizer.state.get(tensor, {}):
                yield f"{moment}.{name}", optimizer.state[tensor][moment]


def _make_moments(optimizer: torch.optim.AdamW, done: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.tensor(float(done), device=parameter.device)
            optimizer.state[parameter] = {"step": step} | {each: torch.zeros_like(parameter) for each in MOMENTS}


def _targets(tensors: Mapping[str, Tensor], spread: "Spread | None") -> list[Target]:
    return [Target(name, _whole(name, each, spread), dtype_name(each.dtype)) for name, each in tensors.items()]


def _whole(name: str, tensor: Tensor, spread: "Spread | None") -> tuple[int, ...]:
    return spread.shapes[name.split(".", 1)[1]] if spread else tuple(tensor.shape)


def _boxes(tensors: Mapping[str, Any], spread: "Spread | None") -> dict[str, range]:
    held = spread.boxes if spread else {}
    return {name: held[own] for name in tensors if (own := name.split(".", 1)[1]) in held}


def _spread(decoder: Decoder) -> "Spread | None":
    if not dist.is_initialized():  # what ranks need takes a second to import
        return None
    from moebius.distributed.spread import spread_of

    return spread_of(decoder)


def _local(tensor: Tensor, spread: "Spread | None") -> Tensor:
    return spread.local(tensor) if spread else tensor
