"""What a config.json says of attention: heads, biases, norms, windows, latents.  No torch."""

from typing import Any, Literal

from moebius.config import DecoderConfig, GroupedQueryAttention, LatentAttention, RmsNorm, Yarn
from moebius.errors import ConfigError
from moebius.models.reading import ConfigReader
from moebius.models.rope_fields import read_rope, write_rope

LATENT_NORM = RmsNorm(1e-6)
"""Of MLA's latents, whatever rms_norm_eps says: no config has a field for it."""


# --- grouped queries -------------------------------------------------------------------------------------------------


def read_attention(
    reader: ConfigReader,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    sinks: bool = False,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    rotary_share: float | None = None,
    yarn: Yarn | None = None,
) -> GroupedQueryAttention:
    """head_dim: the family's, where the field is absent; without one, hidden_size / num_attention_heads.

    theta, rotary_share, yarn: see `read_rope`.
    """
    reader.must_be("attention_dropout", 0)
    heads = reader.integer("num_attention_heads")
    key_value_heads = reader.integer("num_key_value_heads", default=heads, null=heads)
    detail = f"{key_value_heads} does not divide num_attention_heads {heads}"
    reader.relate("num_key_value_heads", heads % key_value_heads == 0, detail, "num_attention_heads")
    width = _read_head_dim(reader, heads, head_dim)
    rope = read_rope(reader, width, theta=theta, rotary_share=rotary_share, yarn=yarn)
    return GroupedQueryAttention(
        heads, key_value_heads, width, rope, qkv_bias, output_bias, qk_norm=qk_norm, sinks=sinks
    )


def _read_head_dim(reader: ConfigReader, heads: int, absent: int | None) -> int:
    hidden_size = reader.integer("hidden_size")
    stated = reader.optional_integer("head_dim", absent=absent, minimum=1)
    if stated is None:
        detail = f"{hidden_size} is no multiple of num_attention_heads {heads}"
        reader.relate("hidden_size", hidden_size % heads == 0, detail, "num_attention_heads", "head_dim")
    head_dim = hidden_size // heads if stated is None else stated
    detail = f"{head_dim} is odd; rotary embedding takes channels in pairs"
    reader.relate("head_dim", head_dim % 2 == 0, detail, *(("hidden_size",) if stated is None else ()))
    return head_dim


def write_attention(attention: GroupedQueryAttention) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        **write_rope(attention.rope),
    }


def grouped_mixer(config: DecoderConfig) -> GroupedQueryAttention:
    """The first layer's mixer, which a family whose layers must be alike writes.  ConfigError: it is another kind."""
    match config.layers[0].mixer:
        case GroupedQueryAttention() as mixer:
            return mixer
        case LatentAttention():
            raise ConfigError(f"a {config.model_type} config.json has no words for latent attention")


# --- windows ---------------------------------------------------------------------------------------------------------


def read_full_attention_only(reader: ConfigReader) -> None:
    """Fields of windows that count only under `use_sliding_window`, which is refused."""
    reader.must_be("use_sliding_window", False)
    reader.ignore("sliding_window", "max_window_layers")
    reader.kinds("layer_types", supported=("full_attention",))


def read_windows(reader: ConfigReader, num_layers: int, *, absent: int) -> tuple[int | None, ...]:
    """The window of each layer, by `layer_types`; every second layer sees all where these are not given.

    absent: the width where `sliding_window` is absent.
    """
    width = reader.optional_integer("sliding_window", absent=absent, minimum=1)
    supported = ("sliding_attention", "full_attention")
    alternating = tuple(supported[number % 2] for number in range(num_layers))
    kinds = reader.kinds("layer_types", supported=supported) or alternating
    detail = f"{len(kinds)} entries for {num_layers} layers"
    reader.relate("layer_types", len(kinds) == num_layers, detail, "num_hidden_layers")
    if width is None and "sliding_attention" in kinds:
        reader.fault("sliding_window", "missing", "layer_types has layers with sliding_attention; expected its width")
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    mixers = (layer.mixer for layer in config.layers)
    windows = [mixer.sliding_window if isinstance(mixer, GroupedQueryAttention) else None for mixer in mixers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


# --- latents ---------------------------------------------------------------------------------------------------------


def read_latent_attention(reader: ConfigReader) -> LatentAttention:
    """MLA as DeepSeek's configs describe it; `head_dim` there repeats qk_rope_head_dim, or means nothing."""
    reader.must_be("attention_dropout", 0)
    reader.must_be("rope_interleave", True)
    reader.ignore("head_dim", "qk_head_dim")
    rope_dim = reader.integer("qk_rope_head_dim")
    reader.relate("qk_rope_head_dim", rope_dim % 2 == 0, f"{rope_dim} is odd; rotary embedding takes channels in pairs")
    return LatentAttention(
        num_heads=_read_latent_heads(reader),
        q_lora_rank=reader.optional_integer("q_lora_rank", absent=1536, minimum=1),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=reader.integer("v_head_dim"),
        rope=read_rope(reader, rope_dim, interleaved=True),
        norm=LATENT_NORM,
        bias=reader.boolean("attention_bias", default=False),
    )


def _read_latent_heads(reader: ConfigReader) -> int:
    heads = reader.integer("num_attention_heads")
    key_value_heads = reader.integer("num_key_value_heads", default=heads, null=heads)
    detail = f"{key_value_heads}, but all {heads} heads have keys and values of their own"
    reader.relate("num_key_value_heads", key_value_heads == heads, detail, "num_attention_heads")
    return heads


def write_latent_attention(attention: LatentAttention) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.bias,
        **write_rope(attention.rope),
    }


def latent_mixer(config: DecoderConfig) -> LatentAttention:
    """As `grouped_mixer`, for a family with latent attention."""
    match config.layers[0].mixer:
        case LatentAttention() as mixer:
            return mixer
        case GroupedQueryAttention():
            raise ConfigError(f"a {config.model_type} config.json has no words for attention without latents")
