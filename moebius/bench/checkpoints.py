"""Checkpoints of the shape of published models, to be measured with: their layout is true, their weights are noise."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moebius.auto import targets_of
from moebius.checkpoint import reversing
from moebius.checkpoint.files import CODES, TensorInfo
from moebius.models import family_of

NOISE = 4_194_301  # numbers, after which they repeat; a prime, so that no two experts are alike
ONE = b"\x80\x3f"  # in bfloat16

QWEN3_30B_A3B: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(folder: Path, config: Mapping[str, Any], max_shard_bytes: int = 4_000_000_000) -> int:
    """Writes config.json and shards of small normal noise, norms of ones, as transformers lays them out: split in the
    model's order, in each file by name, the header padded to 8 bytes.  Gives the bytes of all weights.
    """
    folder.mkdir(parents=True)
    family = family_of(config)
    decoder = family.from_hf(config)
    plan = reversing.from_nothing(family.rules(decoder), targets_of(decoder, family), max_shard_bytes)
    noise = Noise()
    weight_map = {}
    for shard in plan.shards:
        infos = sorted(reversing.infos(shard), key=lambda info: info.name)
        _write(folder / shard.name, infos, noise)
        weight_map |= {info.name: shard.name for info in infos}
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    return plan.nbytes


class Noise:
    """Bytes of bfloat16 numbers, normal with a deviation of 0.02, one after the other."""

    def __init__(self) -> None:
        self._bytes = (torch.randn(NOISE) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
        self._at = 0

    def of(self, nbytes: int) -> Iterator[bytes]:
        """The next so many, in pieces."""
        while nbytes:
            piece = self._bytes[self._at : self._at + nbytes]
            self._at = (self._at + len(piece)) % len(self._bytes)
            nbytes -= len(piece)
            yield piece


def _write(path: Path, infos: Sequence[TensorInfo], noise: Noise) -> None:
    header, left = dict[str, Any](), 0
    for info in infos:
        offsets = [left, left + info.nbytes]
        header[info.name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        left += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in infos:
            of_ones = info.name.endswith("norm.weight")  # noise there would leave nothing of what a layer computes
            file.writelines([ONE * (info.nbytes // 2)] if of_ones else noise.of(info.nbytes))
