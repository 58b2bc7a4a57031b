"""Qwen1.5, Qwen2 and Qwen2.5, dense (Qwen Team 2024): biases on q, k and v; small members tie the head."""

from typing import Any

from moebius.checkpoint.converter import Rule
from moebius.config import DecoderConfig, DenseMlp, LayerConfig
from moebius.errors import ConfigError
from moebius.models.attention_fields import grouped_mixer, read_attention, read_full_attention_only, write_attention
from moebius.models.decoder_fields import read_decoder, write_decoder
from moebius.models.family import Family
from moebius.models.layer_fields import read_num_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS


def _read(reader: ConfigReader) -> DecoderConfig:
    read_full_attention_only(reader)
    reader.must_be("use_mrope", False)
    mixer = read_attention(reader, qkv_bias=True)
    dense = DenseMlp(reader.integer("intermediate_size"))
    layers = (LayerConfig(mixer, dense),) * read_num_layers(reader)
    return read_decoder(reader, "qwen2", layers, eps=1e-6)


def _write(config: DecoderConfig) -> dict[str, Any]:
    dense = config.layers[0].feed_forward
    if not isinstance(dense, DenseMlp):
        raise ConfigError("a qwen2 config.json cannot say that a layer has experts")
    return {
        **write_decoder(config),
        **write_attention(grouped_mixer(config)),
        "intermediate_size": dense.intermediate_size,
        "use_sliding_window": False,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return SKIPPED_KEYS


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _read, _write, _rules)
