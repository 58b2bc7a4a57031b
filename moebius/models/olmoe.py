"""OLMoE (Muennighoff et al. 2024): norms of q and k over their full width, weights not renormalised."""

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, LayerConfig, SoftmaxTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, write_attention
from moebius.models.decoder_fields import SpecialId, read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import only_moe, read_moe, read_num_layers, routing_of
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, standard_experts

SPECIAL_IDS: Mapping[SpecialId, int] = {"eos_token_id": 50279, "pad_token_id": 1}


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.must_be("clip_qkv", None)
    bias = reader.boolean("attention_bias", default=False)
    mixer = read_attention(reader, qkv_bias=bias, output_bias=bias, qk_norm="full")
    routing = SoftmaxTopK(renormalize=reader.boolean("norm_topk_prob", default=False))
    moe = read_moe(reader, width_field="intermediate_size", routing=routing)
    layers = (LayerConfig(mixer, moe),) * read_num_layers(reader)
    return read_decoder(reader, "olmoe", layers, eps=1e-5, aux_loss_coef=0.01, special_ids=SPECIAL_IDS)


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer, moe = grouped_mixer(config), only_moe(config)
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **write_attention(mixer),
        "attention_bias": mixer.qkv_bias,
        "clip_qkv": None,
        "intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": routing_of(config, SoftmaxTopK).renormalize,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *SKIPPED_KEYS)


FAMILY = Family("olmoe", "OlmoeForCausalLM", _read, _write, _rules)
