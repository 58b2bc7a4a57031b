"""The families that Moebius knows: one file each, and the only registry of models.  No torch."""

import difflib
from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.files import shown
from moebius.errors import ConfigError
from moebius.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    kimi,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3_moe,
)
from moebius.models.family import Family

__all__ = ["FAMILIES", "Family", "family_of"]

_BUILT_IN = (
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    olmoe.FAMILY,
    qwen2.FAMILY,
    gpt_oss.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    kimi.KIMI_K2,
    kimi.KIMI_K25,
    glm4_moe.FAMILY,
    minimax_m2.FAMILY,
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _BUILT_IN}


def family_of(raw_config: Mapping[str, Any]) -> Family:
    """The family that a config.json's `model_type` names.  ConfigError: none, or one that is not built in."""
    if not isinstance(raw_config, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(raw_config).__name__}")
    model_type = raw_config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    found = "it is missing" if model_type is None else f"{shown(model_type)} is not built in"
    known = difflib.get_close_matches(str(model_type), FAMILIES, n=len(FAMILIES), cutoff=0.0)
    raise ConfigError(
        f"config.json: model_type: {found}; known: {', '.join(known)}",
        advice="take a checkpoint of one of these families, or add the family: one file in moebius/models/",
    )
