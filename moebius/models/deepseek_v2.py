"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024): latent attention, softmax routing within groups, shared experts."""

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, SoftmaxGroupTopK
from moebius.models.attention_fields import latent_mixer, read_latent_attention, write_latent_attention
from moebius.models.decoder_fields import SpecialId, read_decoder, write_decoder
from moebius.models.family import Family
from moebius.models.layer_fields import (
    ROUTED_EXPERTS,
    read_groups,
    read_leading_dense_layers,
    read_moe,
    read_plain_shared_expert,
    write_leading_dense_layers,
    write_routed_experts,
)
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS, plain_shared_expert, standard_experts

SPECIAL_IDS: Mapping[SpecialId, int] = {"bos_token_id": 1, "eos_token_id": 2}
GREEDY, GROUPED = "greedy", "group_limited_greedy"

# Of training, or of how the model was spread over machines.
INERT = ("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "output_router_logits")


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*INERT)
    for field, supported in {"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False}.items():
        reader.must_be(field, supported)
    moe = read_moe(
        reader,
        width_field="moe_intermediate_size",
        experts_fields=ROUTED_EXPERTS,
        routing=_read_routing(reader),
        shared_expert=read_plain_shared_expert(reader, default=2),
    )
    layers = read_leading_dense_layers(reader, read_latent_attention(reader), moe, default=0)
    return read_decoder(reader, "deepseek_v2", layers, eps=1e-6, special_ids=SPECIAL_IDS)


def _read_routing(reader: ConfigReader) -> SoftmaxGroupTopK:
    """`greedy` chooses among all experts, whatever is said of groups."""
    scale = reader.positive("routed_scaling_factor", default=1.0)
    reader.ignore("n_group", "topk_group")
    if reader.one_of("topk_method", supported=(GREEDY, GROUPED), default=GREEDY) == GREEDY:
        return SoftmaxGroupTopK(scale=scale)
    num_groups, top_groups = read_groups(reader, groups=1, kept=1, fewest=1)
    return SoftmaxGroupTopK(num_groups, top_groups, scale)


def _write(config: DecoderConfig) -> dict[str, Any]:
    experts = write_routed_experts(config, SoftmaxGroupTopK())
    return {
        **write_decoder(config),
        **write_latent_attention(latent_mixer(config)),
        **write_leading_dense_layers(config),
        **experts,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "topk_method": GREEDY if experts["n_group"] == 1 else GROUPED,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*standard_experts(), *plain_shared_expert(), *SKIPPED_KEYS)


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read, _write, _rules)
