"""Model folders as tests look at them and change them, and what a model says of a batch."""

import json
from pathlib import Path
from typing import Any

import torch

from moebius import AutoModelForCausalLM
from tests.families import randomize, tiny_config

REMOVED = object()


def rewrite(path: Path, **changes: Any) -> None:
    """Changes the fields of a JSON file."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not REMOVED}))


def saved_model(folder: Path, family: str, seed: int, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """The folder, with a tiny model of random weights in it; changes: to its config."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def ids_for(model, batch=2, tokens=24) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Each tensor's bytes, through the safetensors library."""
    from safetensors.torch import load_file

    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: tensor.numpy().tobytes() for part in parts for key, tensor in part.items()}


def open_in_transformers(folder: Path) -> Any:
    """The folder in transformers' own class, float32, every key accounted for; kimi_k2 is deepseek_v3 to it."""
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM as Peer

    raw = json.loads((folder / "config.json").read_text())
    model_type = {"kimi_k2": "deepseek_v3"}.get(raw["model_type"], raw["model_type"])
    config = AutoConfig.for_model(**{**raw, "model_type": model_type})
    model, info = Peer.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()
