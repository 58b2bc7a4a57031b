"""DeepSeek-V3, V3.1 and R1 (DeepSeek-AI 2024): latent attention, sigmoid routing with a correction bias, and groups."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, SigmoidTopK
from moebius.models.attention_fields import latent_mixer, read_latent_attention, write_latent_attention
from moebius.models.decoder_fields import SpecialId, read_decoder, write_decoder
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
from moebius.models.rules import SKIPPED_KEYS, plain_shared_expert, skipped_layers, standard_experts

SPECIAL_IDS: Mapping[SpecialId, int] = {"bos_token_id": 0, "eos_token_id": 1}

# Of training, of how the model was spread over machines, or of layers that are skipped.
INERT = (
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "pretraining_tp",
    "output_router_logits",
    "num_nextn_predict_layers",
    "num_mtp_layers",
)


def read_deepseek_v3(reader: ConfigReader, *, model_type: str) -> DecoderConfig:
    """model_type: of the DecoderConfig; Kimi's models are described in the same words."""
    reader.ignore(*INERT)
    moe = read_moe(
        reader,
        width_field="moe_intermediate_size",
        experts_fields=ROUTED_EXPERTS,
        routing=read_sigmoid_routing(reader, groups=8, kept=4, scale=2.5),
        shared_expert=read_plain_shared_expert(reader, default=1),
    )
    layers = read_leading_dense_layers(reader, read_latent_attention(reader), moe, default=3)
    return read_decoder(reader, model_type, layers, eps=1e-6, special_ids=SPECIAL_IDS)


def write_deepseek_v3(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_latent_attention(latent_mixer(config)),
        **write_leading_dense_layers(config),
        **write_routed_experts(config, SigmoidTopK(renormalize=True)),
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


def deepseek_v3_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *plain_shared_expert(), *SKIPPED_KEYS, *skipped_layers(config))


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    partial(read_deepseek_v3, model_type="deepseek_v3"),
    write_deepseek_v3,
    deepseek_v3_rules,
)
