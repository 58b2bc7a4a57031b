"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (Zhipu AI 2025): DeepSeek-V3's routing, grouped-query attention, half the rope."""

from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, SigmoidTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, write_attention
from moebius.models.decoder_fields import read_decoder, write_decoder
from moebius.models.family import Family
from moebius.models.layer_fields import (
    ROUTED_EXPERTS,
    only_moe,
    read_leading_dense_layers,
    read_moe,
    read_plain_shared_expert,
    read_sigmoid_routing,
    routing_of,
    write_groups,
    write_leading_dense_layers,
    write_plain_shared_expert,
)
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, plain_shared_expert, skipped_layers, standard_experts

INERT = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "output_router_logits",
)  # of layers that are skipped, of training


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
    mixer, moe, routing = grouped_mixer(config), only_moe(config), routing_of(config, SigmoidTopK)
    return {
        **write_decoder(config),
        **write_attention(mixer),
        **write_leading_dense_layers(config),
        **write_plain_shared_expert(config),
        **write_groups(routing),
        "partial_rotary_factor": mixer.rope.rotary_dim / mixer.head_dim,
        "attention_bias": mixer.qkv_bias,
        "use_qk_norm": mixer.qk_norm == "head",
        "moe_intermediate_size": moe.intermediate_size,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": routing.renormalize,
        "num_nextn_predict_layers": 0,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *plain_shared_expert(), *SKIPPED_KEYS, *skipped_layers(config))


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", _read, _write, _rules)
