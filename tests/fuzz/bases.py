"""The checkpoints that are damaged: as small as their layouts allow, each valid, kept in memory as bytes.

V vocabulary, H hidden, WIDTH of an expert, E experts.  Keys and shapes are written out as the hub has them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.families import tiny_config
from tests.fuzz.documents import CONFIG, INDEX, SINGLE, Files
from tests.quantized_folders import FP8_CONFIG, INT4_CONFIG, MXFP4_CONFIG, Form, fp8_block, int4_pack, mxfp4

V, H, WIDTH, E = 24, 64, 32, 3  # MXFP4 takes inputs in blocks of 32
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
LATENT_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "num_hidden_layers": 2,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
}
LATENT_SIZES |= {"n_group": 1, "topk_group": 1}
BLOCK = [24, 20]  # divides none of the widths: matrices end in partial blocks
Shapes = dict[str, tuple[int, ...]]
Encode = Callable[[str, Tensor], Form | None]


@dataclass(frozen=True)
class Base:
    name: str
    files: Files


@cache
def bases() -> tuple[Base, ...]:
    return tuple(Base(name, make()) for name, make in _MAKERS.items())


def base_named(name: str) -> Base:
    return next(base for base in bases() if base.name == name)


# --- shapes, as the hub has them -------------------------------------------------------------------------------------


def _around(vocabulary: int = V) -> Shapes:
    return {
        "model.embed_tokens.weight": (vocabulary, H),
        "model.norm.weight": (H,),
        "lm_head.weight": (vocabulary, H),
    }


def _norms(layer: str) -> Shapes:
    return {f"{layer}.input_layernorm.weight": (H,), f"{layer}.post_attention_layernorm.weight": (H,)}


def _grouped_attention(layer: str) -> Shapes:
    out = {"q_proj": (64, H), "k_proj": (32, H), "v_proj": (32, H), "o_proj": (H, 64)}
    return {f"{layer}.self_attn.{name}.weight": shape for name, shape in out.items()} | _norms(layer)


def _qk_norms(layer: str) -> Shapes:
    return {f"{layer}.self_attn.{name}_norm.weight": (16,) for name in "qk"}


def _latent_attention(layer: str) -> Shapes:
    at = f"{layer}.self_attn"
    return {
        f"{at}.q_a_proj.weight": (24, H),
        f"{at}.q_a_layernorm.weight": (24,),
        f"{at}.q_b_proj.weight": (4 * 36, 24),
        f"{at}.kv_a_proj_with_mqa.weight": (32, H),
        f"{at}.kv_a_layernorm.weight": (16,),
        f"{at}.kv_b_proj.weight": (4 * 32, 16),
        f"{at}.o_proj.weight": (H, 48),
    } | _norms(layer)


def _mlp(place: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    gate, up, down = names
    return {
        f"{place}.{gate}.weight": (width, H),
        f"{place}.{up}.weight": (width, H),
        f"{place}.{down}.weight": (H, width),
    }


def _experts(block: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    shapes: Shapes = {f"{block}.gate.weight": (E, H)}
    for expert in range(E):
        shapes |= _mlp(f"{block}.experts.{expert}", WIDTH, names)
    return shapes


def _qwen3(vocabulary: int = V, layers: int = 1) -> Shapes:
    shapes = _around(vocabulary)
    for layer in (f"model.layers.{number}" for number in range(layers)):
        shapes |= _grouped_attention(layer) | _qk_norms(layer) | _experts(f"{layer}.mlp")
    return shapes


def _qwen3_packed() -> Shapes:
    kept = {key: shape for key, shape in _qwen3().items() if ".experts." not in key}
    at = "model.layers.0.mlp.experts"
    return kept | {f"{at}.gate_up_proj": (E, 2 * WIDTH, H), f"{at}.down_proj": (E, H, WIDTH)}


def _mixtral() -> Shapes:
    layer = "model.layers.0"
    return _around() | _grouped_attention(layer) | _experts(f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))


def _gpt_oss() -> Shapes:
    layer = "model.layers.0"
    biases = {
        f"{layer}.self_attn.{name}_proj.bias": (size,) for name, size in {"q": 64, "k": 32, "v": 32, "o": H}.items()
    }
    experts = f"{layer}.mlp.experts"
    return {
        **_around(),
        **_grouped_attention(layer),
        **biases,
        f"{layer}.self_attn.sinks": (4,),
        f"{layer}.mlp.router.weight": (E, H),
        f"{layer}.mlp.router.bias": (E,),
        f"{experts}.gate_up_proj": (E, H, 2 * WIDTH),
        f"{experts}.gate_up_proj_bias": (E, 2 * WIDTH),
        f"{experts}.down_proj": (E, WIDTH, H),
        f"{experts}.down_proj_bias": (E, H),
    }


def _deepseek(wrapper: str = "") -> Shapes:
    shapes = _around() | _latent_attention("model.layers.0") | _mlp("model.layers.0.mlp", 48)
    shapes |= _latent_attention("model.layers.1") | _experts("model.layers.1.mlp")
    shapes |= _mlp("model.layers.1.mlp.shared_experts", WIDTH)
    shapes |= {"model.layers.1.mlp.gate.e_score_correction_bias": (E,), "model.layers.2.eh_proj.weight": (4, 4)}
    return {f"{wrapper}{key}": shape for key, shape in shapes.items()}


# --- their bytes -----------------------------------------------------------------------------------------------------


def _random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    kept = ("e_score_correction_bias",)  # float32 in a model of any dtype
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: tensor if key.endswith(kept) else tensor.to(dtype) for key, tensor in tensors.items()}


def _encoded(tensors: dict[str, Tensor], encode: Encode) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for key, weight in tensors.items():
        form, stem = encode(key, weight), key.removesuffix(".weight")
        stored |= {key: weight} if form is None else {stem + end: part for end, part in form.stored.items()}
    return {key: tensor.contiguous() for key, tensor in stored.items()}


def _files(config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Files:
    files: Files = {CONFIG: json.dumps(config).encode()}
    if shards == 1:
        return files | {SINGLE: save(tensors, {"format": "pt"})}
    names = [f"model-{at + 1:05d}-of-{shards:05d}.safetensors" for at in range(shards)]
    weight_map = {key: names[at % shards] for at, key in enumerate(tensors)}
    for name in names:
        files[name] = save({key: tensor for key, tensor in tensors.items() if weight_map[key] == name})
    return files | {INDEX: json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()}


def _every_linear(scale_dtype: torch.dtype, block: list[int]) -> Encode:
    plain = ("embed_tokens", "lm_head", ".gate.", "eh_proj")

    def encode(key: str, weight: Tensor) -> Form | None:
        is_plain = weight.ndim != 2 or any(part in key for part in plain)
        return None if is_plain else fp8_block(weight.float(), (block[0], block[1]), scale_dtype)

    return encode


def _routed_experts(key: str, weight: Tensor) -> Form | None:
    return int4_pack(weight) if ".experts." in key else None


def _packed_experts(key: str, weight: Tensor) -> Form | None:
    return mxfp4(weight.transpose(1, 2)) if key.endswith((".gate_up_proj", ".down_proj")) else None


def _qwen3_config(**changes: Any) -> dict[str, Any]:
    return tiny_config("qwen3_moe", **{**SIZES, "num_experts": E, "num_experts_per_tok": 2, **changes})


def _per_expert() -> Files:
    return _files(_qwen3_config(torch_dtype="bfloat16"), _random(_qwen3(), torch.bfloat16))


def _per_expert_sharded() -> Files:
    config = tiny_config("mixtral", **SIZES, num_local_experts=E)
    del config["torch_dtype"]
    return _files(config, _random(_mixtral()), shards=3)


def _packed() -> Files:
    return _files(_qwen3_config(), _random(_qwen3_packed()))


def _tied() -> Files:
    """Two layers, the head stored as well as the embedding, which is large enough for pages to be mapped."""
    vocabulary = 320
    tensors = _random(_qwen3(vocabulary, layers=2))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = _qwen3_config(vocab_size=vocabulary, num_hidden_layers=2, tie_word_embeddings=True)
    return _files(config, tensors, shards=2)


def _gpt_oss_config(**changes: Any) -> dict[str, Any]:
    return tiny_config("gpt_oss", **SIZES, num_local_experts=E, layer_types=["sliding_attention"], **changes)


def _transposed() -> Files:
    return _files(_gpt_oss_config(torch_dtype="float16"), _random(_gpt_oss(), torch.float16))


def _mxfp4() -> Files:
    config = _gpt_oss_config(quantization_config=MXFP4_CONFIG)
    return _files(config, _encoded(_random(_gpt_oss()), _packed_experts), shards=2)


def _fp8() -> Files:
    quantization = FP8_CONFIG | {"weight_block_size": BLOCK}
    config = tiny_config("deepseek_v3", **LATENT_SIZES, torch_dtype="bfloat16", quantization_config=quantization)
    tensors = _random(_deepseek(), torch.bfloat16)
    return _files(config, _encoded(tensors, _every_linear(torch.float32, BLOCK)), shards=2)


def _fp8_powers_of_two() -> Files:
    """Blocks as published, larger than any matrix here."""
    block = [128, 128]
    quantization = FP8_CONFIG | {"weight_block_size": block, "scale_fmt": "ue8m0"}
    config = _qwen3_config(quantization_config=quantization)
    return _files(config, _encoded(_random(_qwen3()), _every_linear(torch.float8_e8m0fnu, block)))


def _int4_wrapped() -> Files:
    text = tiny_config("kimi_k2", **LATENT_SIZES, quantization_config=INT4_CONFIG)
    architecture = "KimiK25ForConditionalGeneration"
    around = {"architectures": [architecture], "model_type": "kimi_k25", "pad_token_id": 0, "vision_config": {"a": 1}}
    seen = {"vision_tower.patch.weight": torch.ones(4, 4), "mm_projector.0.weight": torch.ones(4)}
    tensors = _encoded(_random(_deepseek("language_model.")), _routed_experts)
    return _files({**around, "text_config": text}, tensors | seen)


_MAKERS: dict[str, Callable[[], Files]] = {
    "qwen3-per-expert": _per_expert,
    "mixtral-sharded": _per_expert_sharded,
    "qwen3-packed": _packed,
    "qwen3-tied": _tied,
    "gpt_oss-transposed": _transposed,
    "gpt_oss-mxfp4": _mxfp4,
    "deepseek-fp8": _fp8,
    "qwen3-fp8-e8m0": _fp8_powers_of_two,
    "kimi-int4-wrapped": _int4_wrapped,
}
