"""Qwen3-MoE (Qwen Team 2025): per-head norm of q and k; dense layers where the config says so."""

from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, SoftmaxTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, read_full_attention_only, write_attention
from moebius.models.decoder_fields import read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import read_moe, read_stepped_layers, sparse_layer, write_stepped_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, standard_experts

# Qwen3-Coder's config.json says these of what every member of the family is.
ALWAYS_SO = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}


def _read(reader: ConfigReader) -> DecoderConfig:
    read_full_attention_only(reader)
    for field, supported in ALWAYS_SO.items():
        reader.must_be(field, supported)
    bias = reader.boolean("attention_bias", default=False)
    mixer = read_attention(reader, qkv_bias=bias, output_bias=bias, qk_norm="head")
    routing = SoftmaxTopK(renormalize=reader.boolean("norm_topk_prob", default=False))
    moe = read_moe(reader, width_field="moe_intermediate_size", routing=routing)
    layers = read_stepped_layers(reader, mixer, moe)
    return read_decoder(reader, "qwen3_moe", layers, eps=1e-6, aux_loss_coef=0.001)


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer, (moe, routing) = grouped_mixer(config), sparse_layer(config, SoftmaxTopK(renormalize=False))
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **write_attention(mixer),
        **write_stepped_layers(config),
        "attention_bias": mixer.qkv_bias,
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": routing.renormalize,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *SKIPPED_KEYS)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read, _write, _rules)
