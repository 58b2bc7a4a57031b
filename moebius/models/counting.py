"""How many parameters a DecoderConfig asks for, by role: arithmetic on the config alone, no torch.

Correction biases are not counted: they are never trained by gradient.  E experts, K experts a token, H hidden, I
expert width, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

from moebius.config import (
    DecoderConfig,
    DenseMlp,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    Mixer,
    SparseMoe,
    TopKSoftmax,
)


@dataclass(frozen=True)
class ParameterCounts:
    """by_role: as `Decoder.parameter_roles` names them.  active: what one token uses, embedding and head included."""

    by_role: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        return sum(self.by_role.values())


def count_parameters(config: DecoderConfig) -> ParameterCounts:
    """A tied head counts once, as the embedding."""
    roles, idle = Counter(_around_layers(config)), 0
    for layer in config.layers:
        roles.update(_layer(layer, config.hidden_size))
        idle += _idle_experts(layer, config.hidden_size)
    return ParameterCounts(dict(roles), sum(roles.values()) - idle)


def _around_layers(config: DecoderConfig) -> dict[str, int]:
    table = config.vocab_size * config.hidden_size
    return {"embedding": table, "norm": config.hidden_size, **({} if config.tie_word_embeddings else {"head": table})}


def _layer(layer: LayerConfig, hidden_size: int) -> Counter[str]:
    counts = Counter(_attention(layer.mixer, hidden_size))
    counts["norm"] += 2 * hidden_size
    match layer.feed_forward:
        case DenseMlp():
            counts["dense_mlp"] += 3 * hidden_size * layer.feed_forward.intermediate_size
        case SparseMoe():
            counts.update(_moe(layer.feed_forward, hidden_size))
    return counts


def _attention(mixer: Mixer, hidden_size: int) -> dict[str, int]:
    match mixer:
        case GroupedQueryAttention():
            return _grouped_query_attention(mixer, hidden_size)
        case LatentAttention():
            return _latent_attention(mixer, hidden_size)


def _grouped_query_attention(mixer: GroupedQueryAttention, hidden_size: int) -> dict[str, int]:
    queries, keys = mixer.num_heads * mixer.head_dim, mixer.num_key_value_heads * mixer.head_dim
    biases = mixer.qkv_bias * (queries + 2 * keys) + mixer.output_bias * hidden_size
    norms = {"none": 0, "head": 2 * mixer.head_dim, "full": queries + keys}[mixer.qk_norm]
    return {"attention": 2 * hidden_size * (queries + keys) + biases + mixer.sinks * mixer.num_heads, "norm": norms}


def _latent_attention(mixer: LatentAttention, hidden_size: int) -> dict[str, int]:
    queries = mixer.num_heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    values = mixer.num_heads * mixer.v_head_dim
    stored = mixer.kv_lora_rank + mixer.qk_rope_head_dim
    latent = mixer.q_lora_rank
    query = hidden_size * queries if latent is None else latent * (hidden_size + queries)
    keys_values = hidden_size * stored + mixer.kv_lora_rank * (mixer.num_heads * mixer.qk_nope_head_dim + values)
    biases = mixer.bias * ((latent or 0) + stored + hidden_size)
    return {
        "attention": query + keys_values + values * hidden_size + biases,
        "norm": (latent or 0) + mixer.kv_lora_rank,
    }


def _moe(moe: SparseMoe, hidden_size: int) -> dict[str, int]:
    shared, gate_bias = moe.shared_expert, isinstance(moe.routing, TopKSoftmax)
    counts = {
        "router": moe.num_experts * (hidden_size + gate_bias),
        "routed_experts": moe.num_experts * _expert(moe, hidden_size),
    }
    if shared is None:
        return counts
    return counts | {"shared_experts": 3 * hidden_size * shared.intermediate_size + shared.gated * hidden_size}


def _expert(moe: SparseMoe, hidden_size: int) -> int:
    biases = moe.bias * (2 * moe.intermediate_size + hidden_size)
    return 3 * hidden_size * moe.intermediate_size + biases


def _idle_experts(layer: LayerConfig, hidden_size: int) -> int:
    match layer.feed_forward:
        case SparseMoe() as moe:
            return (moe.num_experts - moe.top_k) * _expert(moe, hidden_size)
        case DenseMlp():
            return 0
