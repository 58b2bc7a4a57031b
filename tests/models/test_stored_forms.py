"""Which quantized form the files may hold: what is read of quantization_config, and what is refused by name."""

from typing import Any

import pytest

from moebius.errors import ConfigError
from moebius.models import family_of
from moebius.quantization.forms import BlockFp8, Mxfp4, PackedInt4
from tests.families import tiny_config
from tests.models.hub_configs import RELEASED
from tests.models.hub_deepseek import KIMI_K25
from tests.quantized_folders import INT4_CONFIG as INT4

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
PER_CHANNEL_FP8: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
        }
    },
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def config_with(form: Any) -> dict[str, Any]:
    return tiny_config("qwen3_moe", quantization_config=form)


def form_of(raw: dict[str, Any]) -> Any:
    return family_of(raw).stored_form(raw)


def integers(**changes: Any) -> dict[str, Any]:
    """The pack-quantized config with fields of its weights changed."""
    group = INT4["config_groups"]["group_0"]
    return {**INT4, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (None, None),
        ({}, None),
        (FP8, BlockFp8((128, 128))),
        ({**FP8, "fmt": "float8_e4m3fn", "weight_block_size": [64, 32]}, BlockFp8((64, 32))),
        ({**FP8, "scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"], "ignored_layers": []}, BlockFp8()),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, Mxfp4()),
        (INT4, PackedInt4(32)),
        (integers(group_size=64), PackedInt4(64)),
        ({**INT4, "version": "0.12.2", "global_compression_ratio": None, "sparsity_config": {}}, PackedInt4(32)),
    ],
)
def test_a_form_is_read_and_says_nothing_of_the_decoder(form, expected):
    raw = config_with(form)
    assert form_of(raw) == expected
    assert family_of(raw).from_hf(raw) == family_of(raw).from_hf(tiny_config("qwen3_moe"))


@pytest.mark.parametrize(
    ("form", "field", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method", "'awq'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quant_method", "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method", "'bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method", "'modelopt'"),
        ({"quant_method": "quark"}, "quant_method", "'quark'"),
        ({"bits": 4}, "quant_method", "null"),
        ({"quant_method": "compressed-tensors"}, "format", "null of compressed-tensors"),
        (PER_CHANNEL_FP8, "format", "'float-quantized' of compressed-tensors"),
        ({**INT4, "format": "nvfp4-pack-quantized"}, "format", "'nvfp4-pack-quantized' of compressed-tensors"),
        ({**FP8, "weight_block_size": None}, "weight_block_size", "scales a tensor or a row"),
        ({"quant_method": "fp8"}, "weight_block_size", "scales a tensor or a row"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size", "[128]"),
        ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size", "[0, 128]"),
        ({**FP8, "fmt": "e5m2"}, "fmt", "'e5m2'"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme", "'static'"),
        ({**FP8, "expert_dtype": "fp4"}, "expert_dtype", "'fp4'"),
        ({**FP8, "mystery": 1}, "mystery", "unknown field"),
        (integers(symmetric=False), "config_groups.group_0.weights.symmetric", "false"),
        (integers(num_bits=8), "config_groups.group_0.weights.num_bits", "8"),
        (integers(type="float"), "config_groups.group_0.weights.type", "'float'"),
        (integers(strategy="channel", group_size=None), "config_groups.group_0.weights.strategy", "'channel'"),
        (integers(actorder="group"), "config_groups.group_0.weights.actorder", "'group'"),
        ({**INT4, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme", "num_bits"),
        ({**INT4, "config_groups": {}}, "config_groups.group_0", "0 groups"),
        ({**INT4, "sparsity_config": {"format": "sparse"}}, "sparsity_config.format", "sparse"),
        ("fp8", "", "an object"),
    ],
)
def test_every_other_form_is_refused_by_name_by_both_readers(form, field, said):
    where = f"quantization_config.{field}".rstrip(".")
    for read in (form_of, family_of(config_with(form)).from_hf):
        with pytest.raises(ConfigError) as raised:
            read(config_with(form))
        (line,) = [str(fault) for fault in raised.value.faults if fault.where == where]
        assert said in line
    if field in ("quant_method", "format"):
        assert len(raised.value.faults) == 1


def test_a_broken_config_still_tells_its_form():
    assert form_of({**config_with(FP8), "hidden_size": "x", "strange": 1}) == BlockFp8()


def test_no_config_that_is_written_has_a_form():
    for raw, *_ in RELEASED.values():
        family = family_of(raw)
        assert family.stored_form(family.to_hf(family.from_hf(raw))) is None


def test_a_wrapper_says_its_form_within_the_text_beside_it_or_both():
    text = {name: value for name, value in KIMI_K25["text_config"].items() if name != "quantization_config"}
    beside = {**KIMI_K25, "text_config": text, "quantization_config": INT4}
    for raw in (KIMI_K25, beside, {**KIMI_K25, "quantization_config": INT4}):
        assert form_of(raw) == PackedInt4(32)
        assert family_of(raw).from_hf(raw) == family_of(raw).from_hf(KIMI_K25)
    assert form_of({**KIMI_K25, "text_config": text}) is None
    with pytest.raises(ConfigError, match="contradiction"):
        form_of({**KIMI_K25, "quantization_config": integers(group_size=64)})
    with pytest.raises(ConfigError, match=r"text_config\.quantization_config\.quant_method"):
        form_of({**KIMI_K25, "text_config": {**text, "quantization_config": {"quant_method": "awq"}}})
