"""Published quantized forms, written from their definitions, element by element where that is clearer: the judge of
moebius.quantization, which it shares nothing with.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.checkpoint.folders import write

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Form(NamedTuple):
    """What the files hold instead of a weight, by the end of their keys, and what it means."""

    stored: dict[str, Tensor]
    meaning: Tensor


def fp8_block(weight: Tensor, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.float32) -> Form:
    """weight [out, in]: e4m3 times one scale a block; the last block of a row or column may be partial."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    values, meaning = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            scale = weight[place].abs().amax() / 448
            scale = torch.exp2(torch.log2(scale).ceil()) if scale_dtype != torch.float32 else scale
            values[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            meaning[place] = values[place].float() * scale
            scales[row, column] = scale
    return Form({".weight": values, ".weight_scale_inv": scales.to(scale_dtype)}, meaning)


def int4_pack(weight: Tensor, group: int = 32) -> Form:
    """weight [out, in]: q in [-8, 7] times one bfloat16 scale a group; eight q + 8 an int32, lowest nibble first."""
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(dim=2) / 7).bfloat16()
    quantized = (groups / scales.float().unsqueeze(2)).round().clamp(-8, 7)
    nibbles = (quantized.flatten(1).long() + 8).unflatten(1, (-1, 8))
    words = sum(nibbles[..., place] << (4 * place) for place in range(8))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    meaning = (quantized * scales.float().unsqueeze(2)).flatten(1)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return Form({".weight_packed": words, ".weight_scale": scales, ".weight_shape": shape}, meaning)


def mxfp4(weight: Tensor) -> Form:
    """weight [E, out, in]: nearest e2m1 code, two a byte, low nibble first, times 2^(scale - 127) a block of 32."""
    blocks = weight.unflatten(2, (-1, 32))
    exponents = (blocks.abs().amax(dim=3) / 6).log2().ceil().clamp(-127, 127)
    scaled = blocks / torch.exp2(exponents).unsqueeze(3)
    nearest = (scaled.abs().unsqueeze(4) - E2M1).abs().argmin(dim=4)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    meaning = torch.where(scaled < 0, -1.0, 1.0) * E2M1[nearest] * torch.exp2(exponents).unsqueeze(3)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return Form({"_blocks": packed, "_scales": (exponents + 127).to(torch.uint8)}, meaning.flatten(2))


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}


class Pair(NamedTuple):
    """A folder with weights in a published form, and one with the plain weights that they stand for."""

    quantized: Path
    plain: Path


def quantized_pair(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    encode: Callable[[str, Tensor], Form | None],
    quantization_config: dict[str, Any],
    *,
    extras: dict[str, Tensor] | None = None,
    shards: int = 3,
) -> Pair:
    """Write both: `tensors` are in the hub's layout; encode(key, weight) says how a weight is stored, None for plain.

    A stored form's keys replace the end of the weight's: ".weight" for matrices, nothing for packed experts.
    """
    stored, plain = dict(extras or {}), {}
    for key, weight in tensors.items():
        form = encode(key, weight)
        plain[key] = weight if form is None else form.meaning
        stem = key.removesuffix(".weight")
        stored |= {key: weight} if form is None else {stem + end: tensor for end, tensor in form.stored.items()}
    write(folder / "quantized", {key: tensor.contiguous() for key, tensor in stored.items()}, shards)
    write(folder / "plain", {key: tensor.contiguous() for key, tensor in plain.items()})
    described = config | {"quantization_config": quantization_config}
    (folder / "quantized" / "config.json").write_text(json.dumps(described))
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    return Pair(folder / "quantized", folder / "plain")
