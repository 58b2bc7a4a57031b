"""Small checkpoint folders, written by the safetensors library, which so judges our own reader and writer."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moebius import checkpoint
from moebius.checkpoint.converter import Rule
from moebius.checkpoint.planning import Plan, Target


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """The tensors in one file, or dealt in turn to several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{at + 1:05d}-of-{shards:05d}.safetensors" for at in range(shards)]
    weight_map = {key: names[at % shards] for at, key in enumerate(tensors)}
    for name in names:
        mine = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        save_file(mine, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def targets(**shapes: tuple[int, ...]) -> list[Target]:
    return [Target(name, shape, "float32") for name, shape in shapes.items()]


def planned(folder: Path, rules: list[Rule], wanted: list[Target], **options) -> Plan:
    return checkpoint.plan(checkpoint.open_files(folder), rules, wanted, **options)


def numbered(*shape: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose elements are all different (in float32)."""
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape).to(dtype)
