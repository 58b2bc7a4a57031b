"""A model on ranks: who takes part, where the files are, what is each rank's; one rank's error is every rank's.

Where nothing is spread there are no ranks (None), every step is this process's alone, and torch.distributed, whose
import takes a second, stays out.
"""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius import arguments
from moebius.checkpoint import hub
from moebius.config import DecoderConfig
from moebius.distributed.config import DistributedConfig
from moebius.errors import ArgumentError, ConfigError, Fault
from moebius.experts.interface import Experts
from moebius.generation.config import GenerationConfig
from moebius.generation.engine import generate, resolve
from moebius.layers.decoder import Decoder
from moebius.placement import DeviceMap, Modules

if TYPE_CHECKING:
    from moebius.distributed.header import StepHeader
    from moebius.distributed.ranks import Ranks
    from moebius.distributed.spread import Spread

DOWNLOAD_SECONDS = 24 * 3600.0
OWN_ARGUMENTS = frozenset(signature(generate).parameters)
"""Of generate, those that are no settings."""
ENOUGH = sys.maxsize  # experts, as long as it is not known how many there are


@dataclass(frozen=True)
class Place:
    """This process's in a job that a model is spread over.  experts_class: what makes a layer's experts here."""

    ranks: "Ranks"
    config: DistributedConfig
    experts_class: Callable[..., Experts]

    def attend(self, model: Decoder) -> "StepHeader":
        """From now on, ranks tell each other what they bring before every forward."""
        from moebius.distributed.header import StepHeader

        header = StepHeader(self.ranks, self.config.batch)
        model.register_forward_pre_hook(header, with_kwargs=True)
        return header


# --- joining ---------------------------------------------------------------------------------------------------------


def entered(config: DistributedConfig | None, device_map: Any = None, max_memory: Any = None) -> "Ranks | None":
    """The job's ranks, before the model is known; None if nothing is to be spread.

    ArgumentError: sizes do not fit, or it says how to spread and not that, or see arguments.device_type_on_ranks.
    """
    if config is None:
        return None
    if not _asks(config):
        _refuse_half_asked(config)
        return None
    from moebius.distributed.ranks import join

    return join(config, ENOUGH, device_type=arguments.device_type_on_ranks(device_map, max_memory))


def arranged(ranks: "Ranks | None", config: DistributedConfig | None, decoder: DecoderConfig) -> Place | None:
    """The ranks as this decoder's experts are spread over them.

    ArgumentError: it has none.  ConfigError: ranks have found different models.
    """
    if ranks is None or config is None:
        return None
    _check_same(ranks, decoder)
    if not decoder.moe_layers:
        raise ArgumentError(
            f"distributed_config: this {decoder.model_type} is dense, it has no experts to spread over ranks",
            advice="leave distributed_config out, and run one process",
        )
    from moebius.distributed.expert_parallel import parallel_experts
    from moebius.distributed.ranks import join

    fewest = min(layer.num_experts for layer in decoder.moe_layers)
    if config.grid(ranks.size, fewest) != ranks.grid:
        ranks = join(config, fewest, device_type=ranks.device.type)
    return Place(ranks, config, parallel_experts(ranks, config))


def _asks(config: DistributedConfig) -> bool:
    sizes = config.ep_size or 0, config.fsdp_size - 1, (config.dp_replicate_size or 1) - 1
    return config.enable_expert_parallel or any(sizes)


def _refuse_half_asked(config: DistributedConfig) -> None:
    default = DistributedConfig()
    faults = [
        Fault(f"{name}={getattr(config, name)!r}", "without effect", "nothing is spread")
        for name in ("batch", "exchange")
        if getattr(config, name) != getattr(default, name)
    ]
    if faults:
        raise ArgumentError(
            "distributed_config says how to spread experts over ranks, and not to do it",
            faults=faults,
            advice="add enable_expert_parallel=True, or an ep_size",
        )


def _check_same(ranks: "Ranks", decoder: DecoderConfig) -> None:
    found = ranks.gathered(decoder, "reading config.json")
    if other := next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None):
        raise ConfigError(f"config.json on rank {other} differs from that on rank 0", advice="give all the same files")


# --- opening ---------------------------------------------------------------------------------------------------------


def check_same_arguments(ranks: "Ranks | None", **given: object) -> None:
    """ArgumentError, on every rank: one opens the model otherwise than rank 0."""
    if ranks:
        ranks.roll_call.check_same(given, "opening a model")


def check_same_weights(model: Decoder, place: Place | None) -> None:
    """CheckpointError, on every rank: what several of them hold is not the same."""
    if place and (spread := spread_of(model)):
        from moebius.distributed import same_weights

        same_weights.check_same_weights(model, spread)


def together(ranks: "Ranks | None", what: str) -> AbstractContextManager[None]:
    """A step that ends well on all ranks or on none."""
    return ranks.together(what) if ranks else nullcontext()


def devices(ranks: "Ranks | None", device_map: Any, max_memory: Any) -> DeviceMap:
    """Where weights go: on ranks, to each rank's own device.  ArgumentError: see arguments.device_map_of."""
    return Modules({"": str(ranks.device)}) if ranks else arguments.device_map_of(device_map, max_memory)


def located(name: str | os.PathLike[str], ranks: "Ranks | None", **download: Any) -> Path:
    """As hub.resolve; what is not there yet is fetched by the first rank of each host, while the others wait."""
    if ranks is None or not any(ranks.gathered(not hub.local_path(name).is_dir(), "looking for the files")):
        return hub.resolve(name, **download)
    hosts, what = ranks.gathered(socket.gethostname(), "looking for the files"), f"fetching {name}"
    with ranks.together(what):
        try:
            if hosts.index(hosts[ranks.rank]) == ranks.rank:
                hub.resolve(name, **download)
        finally:
            ranks.meet(what, DOWNLOAD_SECONDS)
    return hub.resolve(name, **{**download, "force_download": False})


def same_noise(ranks: "Ranks | None", generator: torch.Generator | None) -> torch.Generator | None:
    """What every rank makes the same new model with: the generator, in the state that rank 0's is in, or one of a seed
    that rank 0 draws; torch's own begins otherwise in every process.
    """
    if ranks is None:
        return generator
    what = "making a new model"
    if generator is None:
        return torch.Generator().manual_seed(ranks.told(int(torch.empty((), dtype=torch.int64).random_()), what))
    generator.set_state(ranks.told(generator.get_state(), what))
    return generator


# --- a model that is spread ------------------------------------------------------------------------------------------


def spread_of(model: Decoder) -> "Spread | None":
    """See distributed.spread."""
    from moebius.distributed import spread

    return spread.spread_of(model)


def shard(model: Decoder, place: Place | None) -> None:
    """By FSDP2, where that is asked for; the model has no memory yet."""
    if place and place.ranks.grid.fsdp > 1:
        from moebius.distributed import sharding

        sharding.shard(model, place.ranks)


def generating(
    model: Decoder, header: "StepHeader", config: GenerationConfig, options: Mapping[str, Any]
) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    """See distributed.generating.  config, options: what `generate` is about to be given."""
    from moebius.distributed import generating

    settings: Mapping[str, Any] = {}
    if header.batch == "shared":
        with header.ranks.together("generating"):
            settings = _settings(model, config, options)
    return generating.generating(model, header, settings)


def _settings(model: Decoder, config: GenerationConfig, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those in force; of a caller's own criteria, whether there are any: what they say is asked of rank 0."""
    named = {name: value for name, value in options.items() if name not in OWN_ARGUMENTS}
    criteria = bool(options.get("stopping_criteria"))
    return {**vars(resolve(model.config, config, named)), "stopping_criteria": criteria}
