"""Mixtral (Jiang et al. 2024): sparse on every layer, weights renormalised and kept in float32."""

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.converter import Rule, WeightRenaming
from moebius.config import DecoderConfig, LayerConfig, SoftmaxTopK
from moebius.models import blocks
from moebius.models.family import Family
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, packed_experts

SPECIAL_IDS: Mapping[blocks.SpecialId, int] = {"bos_token_id": 1, "eos_token_id": 2}


def _read(reader: ConfigReader) -> DecoderConfig:
    for field, supported in {"sliding_window": None, "attention_bias": False, "router_jitter_noise": 0}.items():
        reader.must_be(field, supported)
    mixer = blocks.read_attention(reader, theta=1_000_000.0)
    routing = SoftmaxTopK(renormalize=True, float32_weights=True)
    moe = blocks.read_moe(reader, width_field="intermediate_size", routing=routing)
    layers = (LayerConfig(mixer, moe),) * blocks.read_num_layers(reader)
    return blocks.read_decoder(reader, "mixtral", layers, eps=1e-5, aux_loss_coef=0.001, special_ids=SPECIAL_IDS)


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe = blocks.only_moe(config)
    return {
        **blocks.write_decoder(config),
        **blocks.write_attention(blocks.only_mixer(config)),
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": None,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (
        *packed_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
        WeightRenaming("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        *SKIPPED_KEYS,
    )


FAMILY = Family("mixtral", "MixtralForCausalLM", _read, _write, _rules)
