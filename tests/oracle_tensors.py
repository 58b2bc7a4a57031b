"""An oracle's tensors under our names: by the family's own rules, as a checkpoint's would be.

Gradients go the same way, as they have the shapes of what they belong to.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint.planning import Target
from moebius.checkpoint.reading import dtype_name
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from tests.families import make_oracle, tiny_config


def oracle_and_decoder(
    family: str, changes: Mapping[str, Any], backend: str = "auto", seed: int = 0
) -> tuple[Any, Decoder]:
    """The oracle of `tiny_config(family, **changes)`, and a decoder with its very tensors, in eval mode."""
    raw = tiny_config(family, **changes)
    oracle = make_oracle(family, seed, **changes)
    decoder = Decoder(family_of(raw).from_hf(raw), experts_implementation=backend)
    decoder.load_state_dict(under_our_names(oracle.state_dict(), decoder), strict=True)
    return oracle, decoder.eval()


def under_our_names(tensors: Mapping[str, Tensor], decoder: Decoder) -> dict[str, Tensor]:
    """tensors: all that an oracle's state_dict names, with these or other values -> the decoder's names."""
    config = decoder.config
    rules = family_of({"model_type": config.model_type}).rules(config)
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors")
        plan = checkpoint.plan(checkpoint.open_files(Path(folder)), rules, _targets(decoder))
        loaded = checkpoint.load(plan)
    return loaded | {alias: loaded[target.name] for target in plan.targets.values() for alias in target.aliases}


def _targets(decoder: Decoder) -> list[Target]:
    names: dict[int, list[str]] = {}
    state = decoder.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [
        Target(first, tuple(state[first].shape), dtype_name(state[first].dtype), tuple(others))
        for first, *others in names.values()
    ]
