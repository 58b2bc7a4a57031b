"""A family's rules: what a model made from nothing is saved as, and what of a checkpoint is skipped."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moebius import AutoModelForCausalLM
from moebius.checkpoint.converter import WeightSkip
from moebius.models import FAMILIES
from tests.families import TINY, tiny_config
from tests.model_folders import open_in_transformers


def shapes(folder):
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: tuple(tensor.shape) for part in parts for key, tensor in part.items()}


@pytest.mark.parametrize("family", TINY)
def test_a_model_made_from_nothing_has_the_keys_and_shapes_that_transformers_writes(family, checkpoints, tmp_path):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    assert shapes(tmp_path) == shapes(checkpoints(family)[1])


ALL_DENSE = {
    "deepseek_v2": {"first_k_dense_replace": 3},
    "deepseek_v3": {"first_k_dense_replace": 4},
    "kimi_k2": {"first_k_dense_replace": 3},
    "glm4_moe": {"first_k_dense_replace": 3},
    "qwen3_moe": {"mlp_only_layers": [0, 1]},
    "qwen2_moe": {"decoder_sparse_step": 3},
}


@pytest.mark.parametrize(("family", "changes"), ALL_DENSE.items(), ids=ALL_DENSE)
@torch.no_grad()
def test_a_model_without_a_sparse_layer_is_saved_too(family, changes, tmp_path):
    made = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    assert not made.config.moe_layers
    made.save_pretrained(tmp_path / "made")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    loaded.save_pretrained(tmp_path / "again")
    tokens = torch.randint(3, 128, (2, 9))
    for folder in (tmp_path / "made", tmp_path / "again"):
        theirs = open_in_transformers(folder)(tokens).logits
        torch.testing.assert_close(made(tokens).logits, theirs, rtol=0, atol=1e-5)
        assert AutoModelForCausalLM.from_pretrained(folder).config == made.config


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("deepseek_v3", {"e_score_correction_bias"}),
        ("kimi_k2", {"e_score_correction_bias"}),
        ("glm4_moe", {"e_score_correction_bias"}),
        ("minimax_m2", {"e_score_correction_bias", "gate.weight"}),
        ("gpt_oss", set()),
    ],
)
def test_what_is_published_in_float32_is_saved_in_float32(family, kept, tmp_path):
    AutoModelForCausalLM.from_config(tiny_config(family), dtype="bfloat16").save_pretrained(tmp_path)
    wide = [
        key for key, tensor in load_file(tmp_path / "model.safetensors").items() if str(tensor.dtype)[6:] == "float32"
    ]
    assert {ending for ending in kept if any(key.endswith(ending) for key in wide)} == kept
    assert all(key.endswith(tuple(kept)) for key in wide)


def skipping(family: str, key: str, *others: str) -> list[str]:
    """The reasons of the rules that skip a key, where the files hold others too; the model has three layers."""
    config = FAMILIES[family].from_hf(tiny_config(family))
    three = replace(config, layers=config.layers[:1] * 3)
    rules = [rule for rule in FAMILIES[family].rules(three) if isinstance(rule, WeightSkip)]
    return [rule.reason for rule in rules if rule.match(key, (key, *others))]


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "glm4_moe"])
def test_layers_that_predict_more_tokens_are_skipped_where_families_publish_them(family):
    assert skipping(family, "model.layers.3.eh_proj.weight")
    experts = "model.layers.{}.mlp.experts.7.up_proj.weight"
    assert skipping(family, experts.format(10), "model.layers.10.eh_proj.weight")
    assert not skipping(family, experts.format(10), "model.layers.3.eh_proj.weight")  # nothing marks it as such a layer
    assert not skipping(family, experts.format(2), "model.layers.2.eh_proj.weight")


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_a_layer_too_many_is_not_skipped_where_no_such_layers_are_published(family):
    assert not skipping(family, "model.layers.3.input_layernorm.weight")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "qwen3_moe"])
def test_what_is_computed_or_predicts_more_tokens_is_skipped_with_a_reason(family):
    assert skipping(family, "model.layers.0.self_attn.rotary_emb.inv_freq") == ["computed from rope_theta"]
    assert skipping(family, "mtp.layers.0.norm.weight")
    assert not skipping(family, "model.layers.0.mtp.weight")
    assert not skipping(family, "vision_tower.encoder.weight")
