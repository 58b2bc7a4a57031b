"""MiniMax-M2, M2.5 and M2.7 (MiniMax 2025, 2026): full-width norms of q and k, half the rope, sigmoid routing.

The gate's weight and its correction bias are float32 in the files, and stay so.
"""

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.converter import Rule, WeightRenaming
from moebius.config import DecoderConfig, GroupedQueryAttention, LayerConfig, SigmoidTopK
from moebius.models.attention_fields import grouped_mixer, read_attention, write_attention
from moebius.models.decoder_fields import SpecialId, read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import only_moe, read_moe, read_num_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, mixtral_experts

HEAD_DIM = 128
FULL_ATTENTION = (1,)
SPECIAL_IDS: Mapping[SpecialId, int] = {"bos_token_id": 200034, "eos_token_id": 200020}

# Of layers that are in no file, of a shared expert that is not there, of servers.
INERT = (
    "use_mtp",
    "num_mtp_modules",
    "mtp_transformer_layers",
    "mlp_intermediate_size",
    "shared_moe_mode",
    "use_grouped_topk",
    "max_model_len",
)

# What every member says, of what every member is.
ALWAYS_SO = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
    "router_jitter_noise": 0,
    "attention_bias": False,
    "sliding_window": None,
    "attn_window_size": None,
    "swa_rope_theta": -1,
    "num_expert_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1,
    "layernorm_full_attention_beta": 1,
    "layernorm_linear_attention_beta": 1,
    "layernorm_mlp_beta": 1,
    "postnorm": False,
}


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*INERT)
    for field, supported in ALWAYS_SO.items():
        reader.must_be(field, supported)
    routing = SigmoidTopK(renormalize=True, epsilon=0.0, float32_gate=True)
    moe = read_moe(reader, width_field="intermediate_size", routing=routing)
    layers = (LayerConfig(_read_mixer(reader), moe),) * read_num_layers(reader)
    _refuse_linear_attention(reader, len(layers))
    return read_decoder(reader, "minimax_m2", layers, eps=1e-6, aux_loss_coef=0.001, special_ids=SPECIAL_IDS)


def _read_mixer(reader: ConfigReader) -> GroupedQueryAttention:
    """`rotary_dim` and `partial_rotary_factor` say the same."""
    rotary_dim = reader.optional_integer("rotary_dim", minimum=1)
    share = 1.0 if rotary_dim is None else min(1.0, rotary_dim / reader.integer("head_dim", default=HEAD_DIM))
    mixer = read_attention(reader, qk_norm="full", head_dim=HEAD_DIM, theta=5_000_000.0, rotary_share=share)
    detail = f"{rotary_dim}, but rope turns {mixer.rope.rotary_dim} of {mixer.head_dim} channels"
    reader.relate("rotary_dim", rotary_dim in (None, mixer.rope.rotary_dim), detail, "head_dim")
    return mixer


def _refuse_linear_attention(reader: ConfigReader, num_layers: int) -> None:
    kinds = reader.integers("attn_type_list", absent=FULL_ATTENTION * num_layers)
    detail = f"expected {FULL_ATTENTION[0]}, full attention, for each of {num_layers} layers"
    reader.relate("attn_type_list", kinds == FULL_ATTENTION * num_layers, detail, "num_hidden_layers")


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer, moe = grouped_mixer(config), only_moe(config)
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **write_attention(mixer),
        "rotary_dim": mixer.rope.rotary_dim,
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    bias = "e_score_correction_bias"
    return (
        *mixtral_experts(),
        WeightRenaming(f"block_sparse_moe.{bias}", f"mlp.gate.{bias}"),
        WeightRenaming(f"mlp.{bias}", f"mlp.gate.{bias}"),
        *SKIPPED_KEYS,
    )


FAMILY = Family("minimax_m2", "MiniMaxM2ForCausalLM", _read, _write, _rules)
