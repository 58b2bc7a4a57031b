"""The ways that `moebius bench parallel` compares: how each opens a model, computes logits, and makes a decode step.

N ranks, B rows, T tokens a row, P tokens in the cache, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moebius.distributed.config import Batch, DistributedConfig
from moebius.generation.cache import KeyValueCache

Spelling = Mapping[str, Any]
"""The arguments of a DistributedConfig."""
COLLECTIVE_SECONDS = 120.0


@dataclass(frozen=True)
class Way:
    """ranks: one of them, or all.  batch: whether each rank has tokens of its own, or all the same ones.

    spellings: of N, transformers' arguments for it, the newest release's first; the first that works is taken.
    no_grad: how gradients are turned off; FSDP2 refuses torch's quicker way.
    """

    library: Literal["moebius", "transformers"]
    ranks: Literal["one", "all"]
    batch: Batch = "shared"
    spellings: Callable[[int], Sequence[Spelling]] = lambda ranks: ()
    no_grad: Callable[[], Any] = torch.inference_mode

    def size(self, ranks: int) -> int:
        """Processes that it takes, where so many are asked for."""
        return 1 if self.ranks == "one" else ranks

    def batches(self, ranks: int) -> int:
        """Batches that are computed at a time."""
        return self.size(ranks) if self.batch == "distinct" else 1


def _peer_experts(ranks: int) -> Sequence[Spelling]:
    return (
        {"tp_size": ranks, "ep_size": ranks, "tp_plan": {}},
        {"tp_plan": "auto", "enable_expert_parallel": True},
    )


WAYS: Mapping[str, Way] = {
    "moebius 1": Way("moebius", "one"),
    "moebius ep": Way("moebius", "all", "distinct"),
    "moebius ep shared": Way("moebius", "all", "shared"),
    "transformers 1": Way("transformers", "one"),
    "transformers ep": Way("transformers", "all", "shared", _peer_experts),
    "transformers ep distinct": Way(
        "transformers", "all", "distinct", lambda ranks: ({"fsdp_size": ranks, "ep_size": ranks},), torch.no_grad
    ),
    "transformers tp": Way("transformers", "all", "shared", lambda ranks: ({"tp_size": ranks}, {"tp_plan": "auto"})),
}


@dataclass(frozen=True)
class Opened:
    """A model that is open, whatever library it is of.

    spelling: what it took, where several were tried.  planned_bytes: what it said that it would read; None: nothing.
    """

    model: torch.nn.Module
    way: Way
    spelling: str = ""
    planned_bytes: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, input_ids: Tensor, positions: int = 1) -> Tensor:
        """[B, T] -> [B, positions, V]: of the last so many."""
        options: dict[str, Any] = {"logits_to_keep": positions}
        if self.way.library == "transformers":
            options["use_cache"] = False
        with self.way.no_grad():
            return self.model(input_ids=input_ids, **options).logits

    def step(self, input_ids: Tensor) -> Callable[[], Tensor]:
        """A decode step that can be made again and again: of the last of P + 1 tokens [B, P + 1], the others cached.

        It gives the logits [B, 1, V].
        """
        options, forget_one = _cache_of(self.model, self.way, input_ids)
        before, last = input_ids[:, :-1], input_ids[:, -1:]

        def forward(ids: Tensor) -> Tensor:
            with self.way.no_grad():
                return self.model(input_ids=ids, logits_to_keep=1, **options).logits

        def again() -> Tensor:
            logits = forward(last)
            forget_one()
            return logits

        forward(before)

        return again


def _cache_of(model: Any, way: Way, input_ids: Tensor) -> tuple[dict[str, Any], Callable[[], None]]:
    """An empty cache as the model takes it, and what makes it forget its last token."""
    if way.library == "moebius":
        rows, capacity = input_ids.shape
        cache = KeyValueCache.for_decoder(
            model.config, batch=rows, capacity=capacity, dtype=model.dtype, device=model.model.layer_devices
        )
        return {"cache": cache}, lambda: cache.crop(cache.length - 1)
    from transformers import DynamicCache

    peer = DynamicCache(config=model.config)
    return {"past_key_values": peer, "use_cache": True}, lambda: peer.crop(-1)


def opener(way: Way, folder: str, dtype: str, device: str, ranks: int) -> Callable[[], Opened]:
    """What opens the folder's model in that way, the library being imported; every rank calls it.

    Its errors are those of the library.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if way.size(ranks) == 1 and device != "cpu":  # on the CPU transformers wants another library for a device_map
        options["device_map"] = device
    match way.library:
        case "moebius":
            from moebius.auto import AutoModelForCausalLM

            return lambda: _ours(way, partial(AutoModelForCausalLM.from_pretrained, folder, **options), ranks)
        case "transformers":
            from transformers import AutoModelForCausalLM as Peer

            return lambda: _peer(way, partial(Peer.from_pretrained, folder, **options), ranks)


def _ours(way: Way, load: Callable[..., Any], ranks: int) -> Opened:
    config = DistributedConfig(enable_expert_parallel=True, batch=way.batch, timeout_seconds=COLLECTIVE_SECONDS)
    model = load(distributed_config=config) if way.size(ranks) > 1 else load()
    return Opened(model, way, planned_bytes=model.load_report.plan.bytes_to_read)


def _peer(way: Way, load: Callable[..., Any], ranks: int) -> Opened:
    refused: list[str] = []
    for spelling in way.spellings(ranks):
        try:
            return Opened(_distributed(load, spelling).eval(), way, _written(spelling))
        except (TypeError, ValueError) as error:  # how a release says that it does not know a spelling
            refused.append(f"{_written(spelling)}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if refused:
        raise ValueError("; ".join(refused))
    return Opened(load().eval(), way)


def _distributed(load: Callable[..., Any], spelling: Spelling) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig as PeerConfig

    return load(distributed_config=PeerConfig(**spelling))


def _written(spelling: Spelling) -> str:
    return "DistributedConfig(" + ", ".join(f"{name}={value!r}" for name, value in spelling.items()) + ")"
