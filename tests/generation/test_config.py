"""Options of generate: honoured, or refused by name."""

import json
import subprocess
import sys

import pytest
from transformers import GenerationConfig as OracleConfig

from moebius.errors import ArgumentError, ConfigError
from moebius.generation import GenerationConfig
from moebius.generation.config import DEFAULTS
from moebius.generation.options import INERT, OFF_VALUES

QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def test_a_hubs_generation_config_is_read():
    config = GenerationConfig.from_hf(QWEN3)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.6, 20, 0.95)
    assert config.eos_token_id == (151645, 151643)


def test_what_is_written_is_read_back_by_both(tmp_path):
    config = GenerationConfig.from_hf({**QWEN3, "eos_token_id": 7})
    (tmp_path / "generation_config.json").write_text(json.dumps(config.to_hf()))
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert OracleConfig.from_pretrained(tmp_path).eos_token_id == 7


def test_every_option_that_transformers_knows_is_known_here():
    known = {*INERT, *OFF_VALUES, *vars(GenerationConfig())}
    assert sorted(set(vars(OracleConfig())) - known) == []


def test_transformers_own_saved_defaults_are_accepted(tmp_path):
    OracleConfig(**OracleConfig._get_default_generation_params()).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_length == 20


def test_without_generation_config_the_models_special_ids_are_taken(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "hidden_size": 8}))
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(eos_token_id=(2,))


def test_without_generation_config_the_models_own_settings_are_taken_as_transformers_takes_them(tmp_path):
    legacy = {"model_type": "qwen2", "do_sample": True, "temperature": 0.5, "top_k": 7, "num_beams": 1}
    (tmp_path / "config.json").write_text(json.dumps({**legacy, "output_hidden_states": True}))
    config, theirs = GenerationConfig.from_pretrained(tmp_path), OracleConfig.from_model_config(legacy)
    assert (config.do_sample, config.temperature, config.top_k) == (theirs.do_sample, theirs.temperature, theirs.top_k)
    (tmp_path / "config.json").write_text(json.dumps({**legacy, "num_beams": 4}))
    with pytest.raises(ConfigError, match=r"config\.json.*num_beams"):
        GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", list(OFF_VALUES))
def test_an_option_that_is_not_supported_is_refused_by_name_unless_it_is_off(name):
    off = OFF_VALUES[name]
    for value in (None, *off):
        assert GenerationConfig().updated(**{name: value}) == GenerationConfig()
    with pytest.raises(ArgumentError, match=name):
        GenerationConfig().updated(**{name: 3})
    with pytest.raises(ConfigError, match=name):
        GenerationConfig.from_hf({name: [[1, 2]]})


@pytest.mark.parametrize(
    ("typo", "meant"), [("max_tokens", "max_new_tokens"), ("temprature", "temperature"), ("num_beam", "num_beams")]
)
def test_a_typo_is_refused_with_the_nearest_name(typo, meant):
    with pytest.raises(ArgumentError, match=f"{typo}.*{meant}"):
        GenerationConfig().updated(**{typo: 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("max_length", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("do_sample", 1),
        ("eos_token_id", [2, -1]),
        ("eos_token_id", "</s>"),
        ("stop_strings", ["ok", ""]),
        ("stop_strings", [3]),
        ("seed", 1.5),
        ("num_return_sequences", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ArgumentError, match=name):
        GenerationConfig().updated(**{name: value})


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_hf({"num_beams": 4, "top_p": 7, "nonsense": 1})
    assert {fault.where for fault in caught.value.faults} == {"num_beams", "top_p", "nonsense"}


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"temperature": "hot"}', '{"top_k": 1, "top_k": 2}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_layers_fill_what_is_not_set_and_none_switches_off():
    checkpoint = GenerationConfig.from_hf(QWEN3)
    assert GenerationConfig(top_k=3).over(checkpoint).temperature == 0.6
    assert GenerationConfig(top_k=3).over(checkpoint).top_k == 3
    off = checkpoint.updated(top_k=None, eos_token_id=None, do_sample=None)
    assert (off.top_k, off.eos_token_id, off.do_sample) == (0, (), False)
    assert off.over(DEFAULTS).top_k == 0


def test_one_text_or_id_may_stand_for_a_list():
    config = GenerationConfig().updated(eos_token_id=5, stop_strings="stop")
    assert (config.eos_token_id, config.stop_strings) == ((5,), ("stop",))


def test_the_config_needs_no_torch():
    code = "import sys; from moebius.generation import GenerationConfig, TextStreamer; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
