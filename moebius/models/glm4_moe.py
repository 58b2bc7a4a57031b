"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (Zhipu AI 2025): DeepSeek-V3's routing, grouped-query attention, half the rope."""

from typing import Any

from moebius.config import DecoderConfig, SigmoidTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, write_attention
from moebius.models.decoder_fields import read_decoder, write_decoder
from moebius.models.deepseek_v3 import deepseek_v3_rules
from moebius.models.family import Family
from moebius.models.layer_fields import (
    ROUTED_EXPERTS,
    read_leading_dense_layers,
    read_moe,
    read_plain_shared_expert,
    read_sigmoid_routing,
    write_leading_dense_layers,
    write_routed_experts,
)
from moebius.models.reading import ConfigReader

# Of layers that are skipped, of training.
INERT = ("num_nextn_predict_layers", "num_mtp_layers", "output_router_logits")


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*INERT)
    mixer = read_attention(
        reader,
        qkv_bias=reader.boolean("attention_bias", default=False),
        qk_norm="head" if reader.boolean("use_qk_norm", default=False) else "none",
        rotary_share=0.5,
    )
    moe = read_moe(
        reader,
        width_field="moe_intermediate_size",
        experts_fields=ROUTED_EXPERTS,
        routing=read_sigmoid_routing(reader, groups=1, kept=1, scale=1.0),
        shared_expert=read_plain_shared_expert(reader, default=1),
    )
    layers = read_leading_dense_layers(reader, mixer, moe, default=1)
    return read_decoder(reader, "glm4_moe", layers, eps=1e-5)


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer = grouped_mixer(config)
    return {
        **write_decoder(config),
        **write_attention(mixer),
        **write_leading_dense_layers(config),
        **write_routed_experts(config, SigmoidTopK(renormalize=True)),
        "partial_rotary_factor": mixer.rope.rotary_dim / mixer.head_dim,
        "attention_bias": mixer.qkv_bias,
        "use_qk_norm": mixer.qk_norm == "head",
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", _read, _write, deepseek_v3_rules)
