"""The parts of a config.json that families share, each read and written in one place.  No torch.

E experts, K experts a token, H hidden, I expert width.
"""

from collections.abc import Mapping
from typing import Any, Literal

from moebius.config import (
    DecoderConfig,
    DenseMlp,
    GroupedQueryAttention,
    LayerConfig,
    RmsNorm,
    Rope,
    SharedExpert,
    SoftmaxTopK,
    SparseMoe,
)
from moebius.errors import ConfigError
from moebius.models.reading import ConfigReader

MAX_LAYERS = 10_000
DTYPES = ("float32", "bfloat16", "float16", "float64")

SpecialId = Literal["bos_token_id", "eos_token_id", "pad_token_id"]
NO_IDS: Mapping[SpecialId, int] = {}


def read_decoder(
    reader: ConfigReader,
    model_type: str,
    layers: tuple[LayerConfig, ...],
    *,
    eps: float,
    aux_loss_coef: float | None = None,
    special_ids: Mapping[SpecialId, int] = NO_IDS,
) -> DecoderConfig:
    """Everything around the layers.

    eps, aux_loss_coef: the family's defaults of rms_norm_eps and router_aux_loss_coef; None where it has no router.
    special_ids: the family's token ids where the field is absent; null means that there is none.
    """
    reader.must_be("hidden_act", "silu")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        layers=layers,
        norm=RmsNorm(reader.positive("rms_norm_eps", default=eps)),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        dtype=reader.one_of("torch_dtype", "dtype", supported=DTYPES),
        initializer_range=reader.non_negative("initializer_range", default=0.02),
        **_read_special_ids(reader, special_ids),
        **({} if aux_loss_coef is None else _read_router_loss(reader, aux_loss_coef)),
    )


def _read_special_ids(reader: ConfigReader, absent: Mapping[SpecialId, int]) -> dict[str, Any]:
    ends = (absent["eos_token_id"],) if "eos_token_id" in absent else ()
    return {
        "bos_token_id": reader.optional_integer("bos_token_id", absent=absent.get("bos_token_id")),
        "eos_token_id": reader.integers("eos_token_id", absent=ends),
        "pad_token_id": reader.optional_integer("pad_token_id", absent=absent.get("pad_token_id")),
    }


def _read_router_loss(reader: ConfigReader, default: float) -> dict[str, Any]:
    return {
        "router_aux_loss_coef": reader.non_negative("router_aux_loss_coef", default=default),
        "output_router_logits": reader.boolean("output_router_logits", default=False),
    }


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        **({} if config.dtype is None else {"torch_dtype": config.dtype}),
        **(_write_router_loss(config) if config.moe_layers else {}),
    }


def _write_router_loss(config: DecoderConfig) -> dict[str, Any]:
    return {
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": config.output_router_logits,
    }


def read_attention(
    reader: ConfigReader,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    theta: float = 10_000.0,
) -> GroupedQueryAttention:
    """theta: the family's default of rope_theta."""
    reader.must_be("attention_dropout", 0)
    heads = reader.integer("num_attention_heads")
    key_value_heads = reader.integer("num_key_value_heads", default=heads)
    detail = f"{key_value_heads} does not divide num_attention_heads {heads}"
    reader.relate("num_key_value_heads", heads % key_value_heads == 0, detail, "num_attention_heads")
    head_dim = _read_head_dim(reader, heads)
    rope = Rope(_read_theta(reader, theta), head_dim)
    return GroupedQueryAttention(heads, key_value_heads, head_dim, rope, qkv_bias, output_bias, qk_norm)


def _read_head_dim(reader: ConfigReader, heads: int) -> int:
    hidden_size = reader.integer("hidden_size")
    stated = reader.optional_integer("head_dim", minimum=1)
    if stated is None:
        detail = f"{hidden_size} is no multiple of num_attention_heads {heads}"
        reader.relate("hidden_size", hidden_size % heads == 0, detail, "num_attention_heads", "head_dim")
    head_dim = hidden_size // heads if stated is None else stated
    detail = f"{head_dim} is odd; rotary embedding takes channels in pairs"
    reader.relate("head_dim", head_dim % 2 == 0, detail, *(("hidden_size",) if stated is None else ()))
    return head_dim


def _read_theta(reader: ConfigReader, default: float) -> float:
    """theta from `rope_theta` or `rope_parameters`, either spelling; every kind but the plain one is refused."""
    reader.must_be("partial_rotary_factor", 1.0)
    nested = reader.section("rope_parameters")
    legacy = reader.section("rope_scaling")
    for section in (nested, legacy):
        section.must_be("rope_type", "default")
        section.must_be("type", "default")
        section.must_be("partial_rotary_factor", 1.0)
    spellings = {
        "rope_theta": reader.raw.get("rope_theta"),
        "rope_parameters.rope_theta": nested.raw.get("rope_theta"),
        "rope_scaling.rope_theta": legacy.raw.get("rope_theta"),
    }
    for section in (reader, nested, legacy):
        section.ignore("rope_theta")
    reader.close(nested)
    reader.close(legacy)
    joined = ConfigReader(spellings)
    theta = joined.positive(*spellings, default=default)
    reader.close(joined)
    return theta


def write_attention(attention: GroupedQueryAttention) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "rope_theta": attention.rope.theta,
    }


def read_full_attention_only(reader: ConfigReader) -> None:
    """Fields of windows that count only under `use_sliding_window`, which is refused."""
    reader.must_be("use_sliding_window", False)
    reader.ignore("sliding_window", "max_window_layers")
    kinds = reader.raw.get("layer_types") or []
    reader.ignore("layer_types")
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        reader.fault("layer_types", "unsupported", f"{kinds!r}; supported: full_attention on every layer")


def read_moe(
    reader: ConfigReader,
    *,
    width_field: str,
    routing: SoftmaxTopK,
    shared_expert: SharedExpert | None = None,
) -> SparseMoe:
    """width_field: which field is I."""
    num_experts = reader.integer("num_experts", "num_local_experts")
    top_k = reader.integer("num_experts_per_tok")
    detail = f"{top_k} experts a token, but num_experts is {num_experts}"
    reader.relate("num_experts_per_tok", top_k <= num_experts, detail, "num_experts")
    width = reader.integer(width_field)
    return SparseMoe(num_experts, top_k, width, routing, shared_expert=shared_expert)


def read_num_layers(reader: ConfigReader) -> int:
    return reader.integer("num_hidden_layers", maximum=MAX_LAYERS)


def read_stepped_layers(reader: ConfigReader, mixer: GroupedQueryAttention, moe: SparseMoe) -> tuple[LayerConfig, ...]:
    """Layer N is dense if `mlp_only_layers` names it, or `decoder_sparse_step` does not divide N + 1."""
    layers = read_num_layers(reader)
    named = reader.integers("mlp_only_layers", below=layers)
    step = reader.integer("decoder_sparse_step", default=1)
    sparse = [number not in named and (number + 1) % step == 0 for number in range(layers)]
    # the width says nothing where no layer is dense, and is then often left out
    width = reader.integer("intermediate_size", default=moe.intermediate_size if all(sparse) else None)
    return tuple(LayerConfig(mixer, moe if is_sparse else DenseMlp(width)) for is_sparse in sparse)


def write_stepped_layers(config: DecoderConfig) -> dict[str, Any]:
    dense = {number: layer.feed_forward for number, layer in enumerate(config.layers)}
    dense = {number: part for number, part in dense.items() if isinstance(part, DenseMlp)}
    widths = [part.intermediate_size for part in dense.values()] or [only_moe(config).intermediate_size]
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(dense), "intermediate_size": widths[0]}


def only_mixer(config: DecoderConfig) -> GroupedQueryAttention:
    """The mixer of the first layer; a family whose layers must be alike writes that one."""
    return config.layers[0].mixer


def only_moe(config: DecoderConfig) -> SparseMoe:
    """The first sparse layer's experts.  ConfigError: there is none."""
    if not config.moe_layers:
        raise ConfigError(f"a {config.model_type} config.json needs at least one layer with experts")
    return config.moe_layers[0]
