"""What a config.json says around the layers.  No torch."""

from collections.abc import Mapping
from typing import Any, Literal

from moebius.config import DecoderConfig, LayerConfig, RmsNorm
from moebius.models.reading import ConfigReader

DTYPES = ("float32", "bfloat16", "float16", "float64")
ALWAYS_SO = {"hidden_act": "silu", "is_encoder_decoder": False, "add_cross_attention": False}

SpecialId = Literal["bos_token_id", "eos_token_id", "pad_token_id"]
NO_IDS: Mapping[SpecialId, int] = {}


def read_decoder(
    reader: ConfigReader,
    model_type: str,
    layers: tuple[LayerConfig, ...],
    *,
    eps: float,
    scale_norm_in_float32: bool = False,
    aux_loss_coef: float | None = None,
    special_ids: Mapping[SpecialId, int] = NO_IDS,
) -> DecoderConfig:
    """Everything around the layers.

    eps, aux_loss_coef: the family's defaults of rms_norm_eps and router_aux_loss_coef; None where its router has no
    such loss.  special_ids: the family's token ids where the field is absent; null means that there is none.
    """
    for field, supported in ALWAYS_SO.items():
        reader.must_be(field, supported)
    return DecoderConfig(
        model_type=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        layers=layers,
        norm=RmsNorm(reader.positive("rms_norm_eps", default=eps), scale_norm_in_float32),
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
    """Without the loss of the router: not every family has one."""
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
    }


def write_router_loss(config: DecoderConfig) -> dict[str, Any]:
    return {
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": config.output_router_logits,
    }
