"""Kimi-K2, K2-Thinking and the text of K2.5 (Moonshot AI 2025, 2026): DeepSeek-V3's decoder, in other sizes.

K2.5's files hold a vision tower too, whose weights are skipped by name.
"""

from functools import partial
from typing import Any

from moebius.checkpoint.converter import PrefixRenaming, Rule, WeightSkip
from moebius.config import DecoderConfig
from moebius.models.deepseek_v3 import deepseek_v3_rules, read_deepseek_v3, write_deepseek_v3
from moebius.models.family import Family
from moebius.models.reading import ConfigReader

TEXT = "text_config"
TEXT_TYPES = ("kimi_k2", "deepseek_v3")
DTYPES = ("torch_dtype", "dtype")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Of images and videos, and of how prompts with them are put together.
VISION_FIELDS = """
    vision_config ignore_index media_placeholder_token_id image_placeholder video_placeholder
    use_unified_vision_chunk image_token_id video_token_id vision_start_token_id
    vision_end_token_id projection_hidden_size projection_layer_norm_eps
"""


def _read_wrapper(reader: ConfigReader) -> DecoderConfig:
    reader.ignore(*VISION_FIELDS.split())
    text = _text_of(reader)
    text.one_of("model_type", supported=TEXT_TYPES)
    config = read_deepseek_v3(text, model_type="kimi_k25")
    text.ignore("quantization_config")
    reader.close(text)
    reader.must_be("tie_word_embeddings", config.tie_word_embeddings)
    return config


def _text_of(reader: ConfigReader) -> ConfigReader:
    """The language model's fields; the wrapper has the last word on special ids, and a dtype if the text has none."""
    text = reader.section(TEXT, optional=False)
    reader.ignore(*IDS, *DTYPES)
    stated = any(text.raw.get(name) is not None for name in DTYPES)
    names = IDS if stated else (*IDS, *DTYPES)
    return text.with_fields({name: reader.raw[name] for name in names if reader.raw.get(name) is not None})


def _write_wrapper(config: DecoderConfig) -> dict[str, Any]:
    text = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", **write_deepseek_v3(config)}
    return {TEXT: text, "tie_word_embeddings": config.tie_word_embeddings}


def _wrapper_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (
        PrefixRenaming("language_model.model", "model"),
        PrefixRenaming("language_model.lm_head", "lm_head"),
        WeightSkip("vision_tower.**", "of images; only the language model is opened"),
        WeightSkip("mm_projector.**", "of images; only the language model is opened"),
        *deepseek_v3_rules(config),
    )


KIMI_K2 = Family(
    "kimi_k2",
    "DeepseekV3ForCausalLM",
    partial(read_deepseek_v3, model_type="kimi_k2"),
    write_deepseek_v3,
    deepseek_v3_rules,
    other_architectures=("KimiK2ForCausalLM",),
)
KIMI_K25 = Family(
    "kimi_k25",
    "KimiK25ForConditionalGeneration",
    _read_wrapper,
    _write_wrapper,
    _wrapper_rules,
    other_architectures=("Kimi_K25ForConditionalGeneration",),
    text_section=TEXT,
)
