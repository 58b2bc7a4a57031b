"""JSON's null, in any field that a family knows: refused, or what transformers takes it for."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from moebius.errors import ConfigError
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from moebius.models.reading import ConfigReader
from tests.families import TINY, YARN, make_oracle, tiny_config
from tests.oracle_tensors import under_our_names

LOGITS = 5e-5
YARN_FIELDS = (*YARN, "rope_type", "truncate", "attention_factor", "rope_theta", "partial_rotary_factor")
NULL_IN_OLDER_FILES = {"num_key_value_heads", "head_dim"}
"""As many as query heads, and hidden_size / heads: the transformers of their day filled them in."""


def known_fields(family: str) -> set[str]:
    """Every field that the family reads or leaves aside, whether the tiny config has it or not."""
    reader = ConfigReader(tiny_config(family))
    family_of(reader.raw).read(reader)
    return reader._read


def with_a_null(family: str) -> dict[str, dict[str, Any]]:
    """Field -> what is changed so that it is null."""
    changes: dict[str, dict[str, Any]] = {field: {field: None} for field in sorted(known_fields(family))}
    scaling = TINY[family].get("rope_scaling")
    within = YARN_FIELDS if scaling else ()
    return changes | {f"rope_scaling.{field}": {"rope_scaling": {**scaling, field: None}} for field in within}


def logits_of_transformers(family: str, changes: dict[str, Any]) -> tuple[Any, torch.Tensor] | None:
    """(the oracle, its logits), or None where transformers has none of it either."""
    try:
        oracle = make_oracle(family, **changes)
        return oracle, oracle(tokens()).logits
    except (StrictDataclassError, TypeError, KeyError):
        return None


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", TINY)
@torch.no_grad()
def test_null_is_refused_or_means_what_it_means_in_transformers(family):
    whole, judged = family_of(TINY[family]).from_hf(tiny_config(family)), []
    for field, changes in with_a_null(family).items():
        try:
            config = family_of(TINY[family]).from_hf(tiny_config(family, **changes))
        except ConfigError:
            continue
        expected = logits_of_transformers(family, changes)
        if expected is None:
            assert config == whole or field in NULL_IN_OLDER_FILES, field
            continue
        decoder = Decoder(config).eval()
        decoder.load_state_dict(under_our_names(expected[0].state_dict(), decoder))
        assert (decoder(tokens()).logits - expected[1]).abs().max() < LOGITS, field
        judged.append(field)
    assert {"eos_token_id", "rope_scaling", "torch_dtype"} <= set(judged)


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("kimi_k2", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("kimi_k2", {"routed_scaling_factor": None}, "routed_scaling_factor"),
        ("kimi_k2", {"first_k_dense_replace": None}, "first_k_dense_replace"),
        ("deepseek_v2", {"topk_method": None}, "topk_method"),
        ("deepseek_v2", {"topk_group": None}, "topk_group"),
        ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor"),
        ("glm4_moe", {"attention_bias": None}, "attention_bias"),
        ("minimax_m2", {"partial_rotary_factor": None}, "partial_rotary_factor"),
        ("qwen3_moe", {"rope_theta": None}, "rope_theta"),
        ("qwen3_moe", {"tie_word_embeddings": None}, "tie_word_embeddings"),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("gpt_oss", {"swiglu_limit": None}, "swiglu_limit"),
        ("gpt_oss", {"rope_scaling": {**YARN, "truncate": None}}, "rope_scaling.truncate"),
    ],
)
def test_a_null_that_would_be_guessed_at_is_refused_by_name(family, changes, field):
    with pytest.raises(ConfigError) as raised:
        family_of(TINY[family]).from_hf(tiny_config(family, **changes))
    (fault,) = raised.value.faults
    assert (fault.where, fault.what) == (field, "value")
    assert "null" in fault.detail


@pytest.mark.parametrize("field", ["num_key_value_heads", "rope_scaling", "q_lora_rank", "pad_token_id"])
def test_a_null_that_published_files_have_is_read(field):
    family_of(TINY["deepseek_v3"]).from_hf(tiny_config("deepseek_v3", **{field: None}))
