"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team 2024): biases on q, k and v, and a gated expert that every token visits."""

from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, SharedExpert, SoftmaxTopK
from moebius.errors import ConfigError
from moebius.models.attention_fields import grouped_mixer, read_attention, read_full_attention_only, write_attention
from moebius.models.decoder_fields import read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import read_moe, read_stepped_layers, sparse_layer, write_stepped_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, standard_experts


def _read(reader: ConfigReader) -> DecoderConfig:
    read_full_attention_only(reader)
    mixer = read_attention(reader, qkv_bias=reader.boolean("qkv_bias", default=True))
    moe = read_moe(
        reader,
        width_field="moe_intermediate_size",
        routing=SoftmaxTopK(renormalize=reader.boolean("norm_topk_prob", default=False)),
        shared_expert=SharedExpert(reader.integer("shared_expert_intermediate_size"), gated=True),
    )
    layers = read_stepped_layers(reader, mixer, moe)
    return read_decoder(reader, "qwen2_moe", layers, eps=1e-6, aux_loss_coef=0.001)


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer, (moe, routing) = grouped_mixer(config), sparse_layer(config, SoftmaxTopK(renormalize=False))
    if moe.shared_expert is None:
        raise ConfigError("a qwen2_moe config.json cannot say that there is no shared expert")
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **write_attention(mixer),
        **write_stepped_layers(config),
        "qkv_bias": mixer.qkv_bias,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_expert.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": routing.renormalize,
        "use_sliding_window": False,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *SKIPPED_KEYS)


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read, _write, _rules)
