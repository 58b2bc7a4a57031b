"""Models that were quantized while they were loaded are saved in published forms: their own loader opens them again to
the same bits, transformers to the numbers that they stand for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import AutoModelForCausalLM, SaveError
from moebius.layers.quantizing import segments_of
from moebius.quantization.decoding import dequantize
from tests.checkpoint.folders import read
from tests.families import make_oracle, save_oracle
from tests.model_folders import ids_for, logits

WIDE = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "intermediate_size": 64}  # for groups of 32
PUBLISHED = [
    ("qwen3_moe", "int8"),
    ("qwen3_moe", "int4"),
    ("qwen3_moe", "fp8"),
    ("deepseek_v3", "int8"),
    ("deepseek_v3", "int4"),
    ("deepseek_v3", "fp8"),
    ("minimax_m2", "fp8"),
    ("gpt_oss", "mxfp4"),
]
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
LINEAR = "model.layers.1.self_attn.o_proj"
ENDS = {
    "int8": {".weight", ".weight_scale"},
    "int4": {".weight_packed", ".weight_scale", ".weight_shape"},
    "fp8": {".weight", ".weight_scale_inv"},
}
every_form = pytest.mark.parametrize("form", ENDS)
every_pair = pytest.mark.parametrize(("family", "form"), PUBLISHED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a plain checkpoint in the hub's layout, made once, in float32."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            oracle = make_oracle(family, **(WIDE if family == "deepseek_v3" else {}))
            made[family] = save_oracle(oracle, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", mapping="never", **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_same(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@every_pair
def test_what_was_quantized_is_saved_and_opened_again_to_the_same_bits(folders, tmp_path, family, form):
    model = opened(folders(family), quantization=form)
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.source.held == model.source.held
    assert_same(model, again)
    ids = ids_for(model)
    assert torch.equal(logits(model, ids), logits(again, ids))


@every_pair
def test_opened_again_it_is_saved_byte_for_byte(folders, tmp_path, family, form):
    opened(folders(family), quantization=form).save_pretrained(tmp_path / "saved", max_shard_size="100kB")
    opened(tmp_path / "saved").save_pretrained(tmp_path / "again")
    shards = sorted((tmp_path / "saved").glob("*.safetensors*"))
    assert len(shards) > 2
    for path in shards:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@every_pair
def test_decoded_it_is_the_weights_that_it_stands_for(folders, tmp_path, family, form):
    model = opened(folders(family), quantization=form)
    model.save_pretrained(tmp_path)
    tensors, plain = model.state_dict(), opened(tmp_path, dtype="float32").state_dict()
    for name, held in model.source.held.items():
        meaning = dequantize(held, tensors[name], tensors[f"{name}_scale"], torch.float32, segments_of(name))
        assert torch.equal(plain[name], meaning), name


@every_form
def test_every_expert_has_its_keys_in_the_hubs_layout(folders, tmp_path, form):
    opened(folders("qwen3_moe"), quantization=form).save_pretrained(tmp_path)
    stored, plain = read(tmp_path), read(folders("qwen3_moe"))
    for module in (EXPERT, LINEAR):
        assert {key.removeprefix(module) for key in stored if key.startswith(f"{module}.")} == ENDS[form]
    if form == "int4":
        assert stored[f"{EXPERT}.weight_shape"].tolist() == list(plain[f"{EXPERT}.weight"].shape)
    untouched = {key for key in plain if "proj" not in key}
    assert all(torch.equal(stored[key], plain[key]) for key in untouched)
    assert "model.layers.0.mlp.gate.weight" in untouched


@every_form
def test_its_config_names_the_form_and_what_is_plain(folders, tmp_path, form):
    plain = {"form": form, "modules_to_not_convert": ["layers.0.self_attn", "layers.1.mlp.experts"]}
    opened(folders("qwen3_moe"), quantization_config=plain).save_pretrained(tmp_path)
    stored = config_of(tmp_path)
    names = stored.get("modules_to_not_convert") or stored["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn.k_proj"} <= set(names)
    assert not {"model.layers.1.self_attn.k_proj", "model.layers.0.mlp.experts"} & set(names)
    assert {"model.layers.1.mlp.experts", "re:model[.]layers[.]1[.]mlp[.]experts[.].*"} & set(names)
    assert set(opened(tmp_path).source.held) == set(opened(folders("qwen3_moe"), quantization_config=plain).source.held)


def test_in_its_own_folder_it_takes_the_plain_ones_place(folders, tmp_path):
    opened(folders("qwen3_moe")).save_pretrained(tmp_path)
    model = opened(tmp_path, quantization="int8")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert_same(opened(tmp_path / "again"), model)


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("gpt_oss", {"form": "fp8"}, "model.layers.0.mlp.experts.gate_up_proj"),
        ("qwen3_moe", {"form": "mxfp4"}, "model.layers.1.mlp.experts.down_proj"),
        ("gpt_oss", {"form": "mxfp4", "parts": ["experts", "linears"]}, "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_form_in_which_the_family_is_not_published_is_refused_and_nothing_is_written(
    folders, tmp_path, family, config, named
):
    model = opened(folders(family), quantization_config=config)
    with pytest.raises(SaveError, match="no published layout") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert named in {fault.where for fault in caught.value.faults}
    assert not (tmp_path / "saved").exists()


def test_packed_experts_are_written_plain_or_refused(folders, tmp_path):
    plain = opened(folders("qwen3_moe"))
    plain.save_pretrained(tmp_path / "packed", layout="packed")
    assert "model.layers.0.mlp.experts.gate_up_proj" in read(tmp_path / "packed")
    assert_same(opened(tmp_path / "packed"), plain)
    opened(tmp_path / "packed").save_pretrained(tmp_path / "published", layout="published")
    assert read(tmp_path / "published").keys() == read(folders("qwen3_moe")).keys()
    with pytest.raises(SaveError, match="no published layout"):
        opened(folders("qwen3_moe"), quantization="int4").save_pretrained(tmp_path / "x", layout="packed")


# --- in other libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")])
def test_transformers_gives_the_same_logits(folders, tmp_path, family, form):
    pytest.importorskip("accelerate")  # without a GPU transformers needs it to decode
    from transformers import FineGrainedFP8Config, Mxfp4Config

    model = opened(folders(family), quantization=form)
    model.save_pretrained(tmp_path)
    decode = FineGrainedFP8Config if form == "fp8" else Mxfp4Config
    theirs, ids = in_transformers(tmp_path, torch.float32, decode(dequantize=True)), ids_for(model)
    with torch.no_grad():
        assert (theirs(ids).logits - logits(model, ids)).abs().max() < 5e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_transformers_decodes_the_same_weights_of_4_bit_integers(folders, tmp_path, family):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    opened(folders(family), quantization="int4").save_pretrained(tmp_path)
    theirs = in_transformers(tmp_path, torch.bfloat16, CompressedTensorsConfig(dequantize=True)).state_dict()
    ours = opened(tmp_path, dtype="bfloat16")
    compared = [name for name in ours.plan.encoded if name in theirs]
    assert any("experts.gate_up_proj" in name for name in compared)
    for name in compared:
        assert torch.equal(theirs[name], ours.state_dict()[name]), name


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_compressed_tensors_decodes_every_expert_and_matrix_to_the_same_numbers(folders, tmp_path, form):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    opened(folders("qwen3_moe"), quantization=form).save_pretrained(tmp_path)
    config, stored = QuantizationConfig.model_validate(config_of(tmp_path)), read(tmp_path)
    decompress = compressors.BaseCompressor.get_value_from_registry(config.format).decompress
    opened(tmp_path, dtype="float32").save_pretrained(tmp_path / "plain")
    ours = read(tmp_path / "plain")
    modules = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    assert {EXPERT, LINEAR} <= set(modules)
    for module in modules:
        ends = {
            key.removeprefix(f"{module}."): tensor for key, tensor in stored.items() if key.startswith(f"{module}.")
        }
        ends["weight_scale"] = ends["weight_scale"].float()  # in which they multiply, as we do
        theirs = decompress(ends, config.config_groups["group_0"])["weight"]
        assert torch.equal(theirs, ours[f"{module}.weight"]), module


def in_transformers(folder: Path, dtype: torch.dtype, decode: Any) -> Any:
    from transformers import AutoModelForCausalLM as Theirs

    model, info = Theirs.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=decode,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()
