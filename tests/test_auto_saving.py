"""What a model saves: transformers opens it, and it is what the model is, wherever it goes."""

import json
import shutil

import pytest
import torch
import transformers

from moebius import (
    ArgumentError,
    AutoModelForCausalLM,
    CheckpointError,
    GenerationConfig,
    SaveError,
)
from tests.families import TINY, make_oracle, save_oracle, tiny_config
from tests.model_folders import ids_for, logits, rewrite, tensors_of


@pytest.mark.parametrize("family", TINY)
def test_load_then_save_is_byte_identical(checkpoints, family, tmp_path):
    _, folder = checkpoints(family)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    weights = sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)
    assert len(weights) > 3
    assert all((tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes() for name in weights)


@pytest.mark.parametrize("made_from", ["files", "nothing"])
@pytest.mark.parametrize("family", TINY)
def test_what_is_saved_opens_in_transformers(checkpoints, family, made_from, tmp_path):
    oracle, folder = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if made_from == "nothing":
        fresh = AutoModelForCausalLM.from_config(model.config)
        fresh.load_state_dict(model.state_dict())
        model = fresh
    model.save_pretrained(tmp_path / "saved")
    reopened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info.values())
    ids = ids_for(model)
    assert torch.equal(logits(reopened, ids), logits(oracle, ids))
    assert tensors_of(tmp_path / "saved") == tensors_of(folder)


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path):
    folder = save_oracle(make_oracle("qwen2", tie_word_embeddings=True), tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in tensors_of(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved") == tensors_of(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_casts_every_weight_and_is_saved_with_it(checkpoints, dtype, tmp_path):
    oracle, folder = checkpoints("mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == torch.bfloat16
    state = oracle.state_dict()
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["5", "GB", "0GB", -1, "1.5GB"])
def test_a_shard_size_must_be_a_size(size, tmp_path):
    with pytest.raises(ArgumentError, match="max_shard_size"):
        AutoModelForCausalLM.from_config(tiny_config("qwen2")).save_pretrained(tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_both_spellings_of_the_dtype_are_brought_up_to_date(checkpoints, tmp_path):
    _, folder = checkpoints("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy / "config.json", dtype="float32", torch_dtype="float32")
    AutoModelForCausalLM.from_pretrained(copy, dtype="bfloat16").save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_generation_setting_that_was_taken_away_does_not_come_back(checkpoints, tmp_path):
    _, folder = checkpoints("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy / "generation_config.json", do_sample=True, temperature=0.6)
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.generation_config = GenerationConfig(eos_token_id=9)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert again == GenerationConfig(eos_token_id=9)


def test_a_model_without_generation_settings_takes_none_from_what_it_replaces(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    AutoModelForCausalLM.from_config(tiny_config("qwen2", **ids)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config == GenerationConfig()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id is None


def test_a_model_saves_over_its_own_files_again_and_again(checkpoints, tmp_path):
    """Also tensors that it does not use, which are copied from the files that it replaces."""
    from safetensors.torch import load_file, save_file

    _, folder = checkpoints("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = {key: value for path in copy.glob("*.safetensors") for key, value in load_file(path).items()}
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, copy / "model.safetensors")
    before = tensors_of(copy)
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.save_pretrained(copy)
    model.save_pretrained(copy)
    assert tensors_of(copy) == before
    model.bfloat16().save_pretrained(copy)
    model.save_pretrained(copy)
    assert AutoModelForCausalLM.from_pretrained(copy).dtype == torch.bfloat16


def test_what_a_save_would_drop_or_cut_is_refused(checkpoints, tmp_path):
    _, folder = checkpoints("qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head = torch.nn.Linear(64, 130, bias=True)
    with pytest.raises(SaveError) as caught:
        model.save_pretrained(tmp_path / "saved")
    assert {fault.where: fault.what for fault in caught.value.faults} == {
        "lm_head.weight": "shape",
        "lm_head.bias": "unexpected",
    }
    assert not (tmp_path / "saved").exists()


def test_a_model_without_weights_is_not_saved(checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")[1], device_map="meta")
    with pytest.raises(SaveError, match="meta device"):
        model.save_pretrained(tmp_path / "saved")


def test_a_home_folder_is_meant_by_the_same_name_in_loading_and_saving(checkpoints, tmp_path, monkeypatch):
    _, folder = checkpoints("qwen2")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained("~/model/")
    model.save_pretrained("~/copy")
    assert tensors_of(tmp_path / "copy") == tensors_of(folder)


def test_a_folder_named_from_here_is_found_from_elsewhere(checkpoints, tmp_path, monkeypatch):
    _, folder = checkpoints("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy / "generation_config.json", cache_implementation="static")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("copy")
    monkeypatch.chdir("/")
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["cache_implementation"] == "static"


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    AutoModelForCausalLM.from_config(tiny_config("qwen2")).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "real", device_map="meta")


def test_the_files_it_was_loaded_from_may_be_gone(checkpoints, tmp_path):
    _, folder = checkpoints("qwen2")
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(copy)
    shutil.rmtree(copy)
    model.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved") == tensors_of(folder)


def test_a_flipped_bit_is_seen_if_checksums_were_saved_and_are_asked_for(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("qwen2")).save_pretrained(tmp_path, checksums=True)
    AutoModelForCausalLM.from_pretrained(tmp_path, check_tensors=True)
    path = tmp_path / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, check_tensors=True)
