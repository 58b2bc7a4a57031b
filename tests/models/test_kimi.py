"""Kimi-K2.5's wrapper: its text is read as Kimi-K2 is, its keys lose their head, its vision is skipped by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius import AutoModelForCausalLM
from moebius.errors import CheckpointError, ConfigError
from moebius.models import family_of
from tests.families import TINY, make_oracle, save_oracle, tiny_config
from tests.models.hub_deepseek import KIMI_K2, KIMI_K25, LEFT_OVER

VISION = {
    "vision_tower.encoder.blocks.0.mlp.fc0.weight": torch.ones(4, 4),
    "vision_tower.patch_embed.pos_emb.weight": torch.ones(2, 2, 4),
    "mm_projector.proj.0.weight": torch.ones(4, 4),
}
EXTRAS = {
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "language_model.model.layers.3.eh_proj.weight": torch.ones(4, 4),
    "language_model.model.layers.3.mlp.experts.0.gate_proj.weight": torch.ones(4, 4),
}


def wrapped(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A wrapper's config.json around a text's."""
    around = {name: value for name, value in KIMI_K25.items() if name not in ("dtype", "bos_token_id", "eos_token_id")}
    return {**around, "pad_token_id": 0, "text_config": {**text, **LEFT_OVER}, **changes}


def read(raw: dict[str, Any]) -> Any:
    return family_of(raw).from_hf(raw)


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_the_text_is_read_as_it_would_be_alone(model_type):
    text = tiny_config("kimi_k2", model_type=model_type)
    found, expected = read(wrapped(text)), read(text)
    assert (found.layers, found.norm, found.dtype) == (expected.layers, expected.norm, expected.dtype)
    assert (found.bos_token_id, found.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
    assert found.model_type == "kimi_k25"


def test_top_k_of_generation_is_not_the_experts_a_token():
    assert KIMI_K25["text_config"]["top_k"] == 50
    assert read(KIMI_K25).moe_layers[0].top_k == 8


def test_the_released_wrapper_differs_from_kimi_k2_as_published():
    ours, alone = read(KIMI_K25), read(KIMI_K2)
    assert ours.norm.eps == 1e-5
    assert ours.layers[0].mixer.rope.yarn.factor == 64
    assert ours.layers[0].feed_forward == alone.layers[0].feed_forward
    assert ours.moe_layers == alone.moe_layers


def test_the_wrapper_has_the_last_word_on_special_ids():
    assert read(wrapped(tiny_config("kimi_k2"), eos_token_id=9, pad_token_id=None)).eos_token_id == (9,)


def test_a_dtype_beside_the_text_counts_where_the_text_has_none():
    text = {name: value for name, value in tiny_config("kimi_k2").items() if name != "torch_dtype"}
    assert read(wrapped(text, dtype="bfloat16")).dtype == "bfloat16"
    assert read(wrapped({**text, "dtype": "float32"}, dtype="bfloat16")).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text_config": {**TINY["kimi_k2"], "n_group": 3}}, "text_config.n_group"),
        ({"text_config": {**TINY["kimi_k2"], "strange": 3}}, "text_config.strange"),
        ({"text_config": {**TINY["kimi_k2"], "model_type": "llama"}}, "text_config.model_type"),
        ({"text_config": {**TINY["kimi_k2"], "rope_scaling": {"type": "su"}}}, "text_config.rope_scaling.type"),
        ({"text_config": {**TINY["kimi_k2"], "add_cross_attention": True}}, "text_config.add_cross_attention"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"strange": 1}, "strange"),
        ({"architectures": ["KimiK3ForConditionalGeneration"]}, "architectures"),
    ],
)
def test_faults_are_named_where_they_stand(changes, field):
    with pytest.raises(ConfigError) as raised:
        read(wrapped(tiny_config("kimi_k2"), **changes))
    assert field in {fault.where for fault in raised.value.faults}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": None}, "missing: expected an object"),
        ({"text_config": 3}, "value: expected an object, found 3"),
        ({"text_config": []}, "value: expected an object, found []"),
    ],
)
def test_a_text_that_is_not_there_is_one_fault(changes, said):
    with pytest.raises(ConfigError) as raised:
        read(wrapped(tiny_config("kimi_k2"), **changes))
    assert [str(fault) for fault in raised.value.faults] == [f"text_config: {said}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights as kimi_k2 publishes them, and as the wrapper does, with vision and left-overs beside them."""
    plain = save_oracle(make_oracle("kimi_k2"), tmp_path_factory.mktemp("plain"))
    (plain / "config.json").write_text(json.dumps(tiny_config("kimi_k2")))
    return plain, wrapper_folder(plain, tmp_path_factory.mktemp("wrapped"), VISION | EXTRAS)


def wrapper_folder(plain: Path, folder: Path, extras: dict[str, torch.Tensor]) -> Path:
    tensors = load_file(plain / "model.safetensors")
    save_file(
        {f"language_model.{key}": tensor for key, tensor in tensors.items()} | extras, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(wrapped(tiny_config("kimi_k2"))))
    return folder


def test_the_wrapper_opens_as_its_language_model(folders):
    plain, wrapper = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    for (name, found), (_, expected) in zip(wrapper.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    assert {info.name for info, _ in wrapper.plan.skipped} == {*VISION, *EXTRAS}


def test_an_extra_that_no_rule_names_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"language_model\.model\.mystery"):
        AutoModelForCausalLM.from_pretrained(
            wrapper_folder(folders[0], tmp_path, {"language_model.model.mystery": torch.ones(2)})
        )
