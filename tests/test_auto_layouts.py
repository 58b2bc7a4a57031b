"""Layouts in which the same weights are published: each opens to the model of the plain per-expert files, and is saved
as it was.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import AutoModelForCausalLM, CheckpointError
from tests.checkpoint.folders import read, write
from tests.families import MOE_FAMILIES, make_oracle, save_oracle, tiny_config
from tests.model_folders import ids_for, logits
from tests.quantized_folders import FP8_CONFIG, INT4_CONFIG, fp8_block, int4_pack, quantized_pair

LAYERS = 3  # of the tiny deepseek_v3


def opened(folder: Path, **options: Any) -> Any:
    """Copied, not mapped: products of weights that are aligned otherwise may differ in their last bit."""
    return AutoModelForCausalLM.from_pretrained(folder, mapping="never", **options)


def hub_tensors(family: str, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return read(save_oracle(make_oracle(family, **changes), folder))


def folder_of(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    write(path, {key: tensor.contiguous() for key, tensor in tensors.items()}, shards)
    (path / "config.json").write_text(json.dumps(config))
    return path


def assert_saved_as_it_was(model: Any, folder: Path, out: Path) -> None:
    model.save_pretrained(out)
    for path in sorted(folder.glob("*.safetensors*")):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def prediction_layer(tensors: dict[str, torch.Tensor], at: int) -> dict[str, torch.Tensor]:
    """A copy of the last layer as the first after it, with what such a layer has besides (DeepSeek-V3's layer 61)."""
    last, fresh = f"model.layers.{at - 1}.", f"model.layers.{at}."
    copied = {fresh + key.removeprefix(last): tensor.clone() for key, tensor in tensors.items() if key.startswith(last)}
    hidden = tensors["model.norm.weight"].shape[0]
    own = {"eh_proj.weight": (hidden, 2 * hidden), "enorm.weight": (hidden,), "shared_head.norm.weight": (hidden,)}
    return copied | {fresh + name: torch.randn(shape) for name, shape in own.items()}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_packed_runtime_layout_opens_too(family, tmp_path):
    config = tiny_config(family)
    plain = opened(folder_of(tmp_path / "plain", config, hub_tensors(family, tmp_path / "hub")))
    if family == "gpt_oss":  # the same names hold the published layout there
        return
    packed = opened(folder_of(tmp_path / "packed", config, dict(plain.state_dict())))
    ids = ids_for(plain)
    assert torch.equal(logits(packed, ids), logits(plain, ids))
    assert_saved_as_it_was(packed, tmp_path / "packed", tmp_path / "out")


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "glm4_moe"])
def test_layers_that_predict_later_tokens_are_skipped_and_carried_over(family, tmp_path):
    config, tensors = tiny_config(family), hub_tensors(family, tmp_path / "hub")
    extra = prediction_layer(tensors, config["num_hidden_layers"])
    model = opened(folder_of(tmp_path / "with", config, tensors | extra))
    assert {info.name for info, _ in model.plan.skipped} == set(extra)
    ids = ids_for(model)
    assert torch.equal(logits(model, ids), logits(opened(folder_of(tmp_path / "without", config, tensors)), ids))
    assert_saved_as_it_was(model, tmp_path / "with", tmp_path / "out")


def test_a_layer_too_many_is_a_fault_where_a_family_publishes_none(tmp_path):
    config, tensors = tiny_config("qwen3_moe"), hub_tensors("qwen3_moe", tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"model.layers.2.\*: unexpected"):
        opened(folder_of(tmp_path / "with", config, tensors | prediction_layer(tensors, 2)))


def test_a_decoder_layer_too_many_is_never_taken_for_one_that_predicts(tmp_path):
    config, tensors = tiny_config("deepseek_v3"), hub_tensors("deepseek_v3", tmp_path / "hub")
    folder = folder_of(tmp_path / "cut", config | {"num_hidden_layers": LAYERS - 1}, tensors)
    with pytest.raises(CheckpointError, match=r"model.layers.2.\*: unexpected"):
        opened(folder)


def test_stray_frequencies_are_skipped(tmp_path):
    config, tensors = tiny_config("kimi_k2"), hub_tensors("kimi_k2", tmp_path / "hub")
    stray = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.randn(4) for n in range(LAYERS)}
    model = opened(folder_of(tmp_path / "with", config, tensors | stray))
    assert {info.name for info, _ in model.plan.skipped} == set(stray)
    assert_saved_as_it_was(model, tmp_path / "with", tmp_path / "out")


def wrapped(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Kimi-K2.5's config.json around a text model's."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {"model_type": "moonvit3d"},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **changes,
    }


def in_wrapper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keys as Kimi-K2.5's files spell them, with something of its vision tower."""
    extras = {
        "vision_tower.encoder.blocks.0.wqkv.weight": torch.randn(6, 2),
        "mm_projector.proj.0.bias": torch.randn(4),
    }
    return {f"language_model.{key}": tensor for key, tensor in tensors.items()} | extras


def test_a_wrapper_opens_for_its_language_model(tmp_path):
    text, tensors = tiny_config("kimi_k2"), hub_tensors("kimi_k2", tmp_path / "hub")
    model = opened(folder_of(tmp_path / "wrapped", wrapped(text), in_wrapper(tensors)))
    assert {info.name.split(".")[0] for info, _ in model.plan.skipped} == {"vision_tower", "mm_projector"}
    ids = ids_for(model)
    assert torch.equal(logits(model, ids), logits(opened(folder_of(tmp_path / "plain", text, tensors)), ids))
    assert_saved_as_it_was(model, tmp_path / "wrapped", tmp_path / "out")


def test_a_wrapper_whose_experts_are_packed_integers_is_kept_or_decoded(tmp_path):
    text, tensors = tiny_config("kimi_k2"), hub_tensors("kimi_k2", tmp_path / "hub")
    pair = quantized_pair(
        tmp_path, text, tensors, lambda key, weight: int4_pack(weight) if ".experts." in key else None, INT4_CONFIG
    )
    config = wrapped(text | {"quantization_config": INT4_CONFIG})
    folder = folder_of(tmp_path / "wrapped", config, in_wrapper(read(pair.quantized)))
    kept, plain = opened(folder, experts_implementation="eager"), opened(pair.plain, experts_implementation="eager")
    ids = ids_for(plain)
    assert len(kept.source.held) == 4  # two sparse layers, two projections each
    assert (logits(kept, ids) - logits(plain, ids)).abs().max() < 1e-5
    assert_saved_as_it_was(kept, folder, tmp_path / "out")
    decoded = opened(folder, dtype="float32", experts_implementation="eager")
    assert torch.equal(logits(decoded, ids), logits(plain, ids))
    decoded.save_pretrained(tmp_path / "decoded")
    assert read(tmp_path / "decoded").keys() == {f"language_model.{key}" for key in tensors}
    saved = json.loads((tmp_path / "decoded/config.json").read_text())
    assert "quantization_config" not in saved["text_config"]
    assert torch.equal(logits(opened(tmp_path / "decoded", experts_implementation="eager"), ids), logits(plain, ids))


def test_blocks_of_128_end_in_a_partial_one_and_predicting_layers_are_quantized_too(tmp_path):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows and 5 scales."""
    changes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "hidden_size": 192, "num_hidden_layers": 2}
    config, tensors = tiny_config("deepseek_v3", **changes), hub_tensors("deepseek_v3", tmp_path / "hub", **changes)

    def encode(key, weight):
        plain = weight.ndim != 2 or any(part in key for part in ("embed_tokens", "lm_head", "mlp.gate."))
        return None if plain else fp8_block(weight)

    form = FP8_CONFIG | {"weight_block_size": [128, 128]}
    extra = prediction_layer(tensors, 2)
    pair = quantized_pair(tmp_path, config, tensors | extra, encode, form)
    stored = read(pair.quantized)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    kept, decoded = (opened(pair.quantized, dtype=dtype, experts_implementation="eager") for dtype in (None, "float32"))
    plain = opened(pair.plain, experts_implementation="eager")
    ids = ids_for(plain)
    assert torch.equal(logits(decoded, ids), logits(plain, ids))
    assert (logits(kept, ids) - logits(plain, ids)).abs().max() < 1e-5
    assert_saved_as_it_was(kept, pair.quantized, tmp_path / "out")


def test_a_vision_tower_outside_a_wrapper_is_unexpected(tmp_path):
    config, tensors = tiny_config("kimi_k2"), hub_tensors("kimi_k2", tmp_path / "hub")
    with pytest.raises(CheckpointError, match="vision_tower"):
        opened(folder_of(tmp_path / "with", config, tensors | {"vision_tower.w": torch.randn(2)}))


def test_a_wrapper_made_from_nothing_is_saved_in_the_wrappers_layout(tmp_path):
    from moebius.models import FAMILIES

    config = FAMILIES["kimi_k25"].from_hf(wrapped(tiny_config("kimi_k2")))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert all(key.startswith("language_model.") for key in read(tmp_path))
    ids = ids_for(model)
    assert torch.equal(logits(opened(tmp_path), ids), logits(model.eval(), ids))
