"""Mixtral (Jiang et al. 2024): sparse on every layer, weights renormalised and kept in float32."""

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, LayerConfig, SoftmaxTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, write_attention
from moebius.models.decoder_fields import SpecialId, read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import only_moe, read_moe, read_num_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, mixtral_experts

SPECIAL_IDS: Mapping[SpecialId, int] = {"bos_token_id": 1, "eos_token_id": 2}


def _read(reader: ConfigReader) -> DecoderConfig:
    for field, supported in {"sliding_window": None, "attention_bias": False, "router_jitter_noise": 0}.items():
        reader.must_be(field, supported)
    mixer = read_attention(reader, theta=1_000_000.0)
    routing = SoftmaxTopK(renormalize=True, float32_weights=True)
    moe = read_moe(reader, width_field="intermediate_size", routing=routing)
    layers = (LayerConfig(mixer, moe),) * read_num_layers(reader)
    return read_decoder(reader, "mixtral", layers, eps=1e-5, aux_loss_coef=0.001, special_ids=SPECIAL_IDS)


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe = only_moe(config)
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **write_attention(grouped_mixer(config)),
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": None,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*mixtral_experts(), *SKIPPED_KEYS)


FAMILY = Family("mixtral", "MixtralForCausalLM", _read, _write, _rules)
