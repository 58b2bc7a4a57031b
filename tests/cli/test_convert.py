"""convert writes a checkpoint that opens again, with the files beside it, and refuses what it would have to guess."""

import json
from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM, AutoTokenizer
from tests.checkpoint.folders import read
from tests.families import make_oracle, save_oracle


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A plain qwen3_moe wide enough for groups of 32, with a tokenizer, notes, and a folder inside."""
    from tests.tokenizer_builders import byte_level_bpe

    folder = save_oracle(make_oracle("qwen3_moe", vocab_size=512), tmp_path_factory.mktemp("models") / "plain")
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("what it is")
    (folder / "consolidated.pth").write_bytes(b"weights once more")
    (folder / "original").mkdir()
    return folder


def weights(folder: Path, **options) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, mapping="never", **options).state_dict()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_it_writes_what_quantization_gives(moebius, source, tmp_path, form):
    ended = moebius("convert", source, tmp_path / "out", "--quantization", form)
    assert ended.code == 0, ended.err
    assert "per-expert layout, complete" in ended.out
    assert_same(weights(tmp_path / "out"), weights(source, quantization=form))


def test_files_beside_the_weights_come_along_and_other_weights_do_not(moebius, source, tmp_path):
    report = json.loads(moebius("convert", source, tmp_path / "out", "--dtype", "bfloat16", "--json").out)
    assert report["copied"] == ["README.md", "tokenizer.json"]
    assert (tmp_path / "out" / "README.md").read_text() == "what it is"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("expert")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "generation_config.json"}
    assert not (tmp_path / "out" / "consolidated.pth").exists()


def test_it_says_in_json_what_it_did(moebius, source, tmp_path):
    out = tmp_path / "out"
    report = json.loads(
        moebius("convert", source, out, "--quantization", "int4", "--max-shard-size", "100kB", "--json").out
    )
    assert report["forms"] == ["int4_pack"]
    assert report["layout"] == "per-expert layout"
    assert report["files"] == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert len(report["files"]) > 1
    assert report["tensors"] == len(read(out))
    assert report["bytes"] < 0.6 * report["source"]["bytes"]


def test_a_dtype_makes_plain_weights_of_quantized_ones(moebius, source, tmp_path):
    moebius("convert", source, tmp_path / "int8", "--quantization", "int8")
    ended = moebius("convert", tmp_path / "int8", tmp_path / "out", "--dtype", "float32")
    assert ended.code == 0, ended.err
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "int8", dtype="float32"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert read(tmp_path / "out").keys() == read(source).keys()


def test_experts_are_packed_and_taken_apart_again(moebius, source, tmp_path):
    assert "packed layout" in moebius("convert", source, tmp_path / "packed", "--layout", "packed").out
    assert "model.layers.0.mlp.experts.down_proj" in read(tmp_path / "packed")
    moebius("convert", tmp_path / "packed", tmp_path / "apart", "--layout", "per-expert")
    theirs = read(source)
    assert read(tmp_path / "apart").keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in read(tmp_path / "apart").items())


def test_some_modules_can_stay_plain(moebius, source, tmp_path):
    flags = ("--quantization", "int4", "--group-size", "16", "--experts-only", "--modules-to-not-convert", "layers.0")
    moebius("convert", source, tmp_path / "out", *flags)
    packed = {key.split(".mlp.experts.")[0] for key in read(tmp_path / "out") if key.endswith(".weight_packed")}
    assert packed == {"model.layers.1"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "nothing to convert"),
        (("--group-size", "16"), "say it too"),
        (("--quantization", "int8", "--group-size", "16"), "group_size=16"),
        (("--quantization", "mxfp4"), "no published layout"),
        (("--quantization", "int4", "--layout", "packed"), "no published layout"),
        (("--max-shard-size", "many"), "max_shard_size"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(moebius, source, tmp_path, flags, told):
    ended = moebius("convert", source, tmp_path / "out", *flags)
    assert ended.code in (1, 3)
    assert told in ended.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(moebius, source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    ended = moebius("convert", source, tmp_path, "--dtype", "bfloat16")
    assert ended.code == 3
    assert "is there already" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(moebius, source, tmp_path):
    assert moebius("convert", source, tmp_path, "--dtype", "bfloat16").code == 0


def test_plan_shows_what_would_be_quantized(moebius, source):
    ended = moebius("plan", source, "--quantization", "int4", "--device", "cpu")
    assert "float32 -> int4_pack  mlp.experts.*.{gate_proj,up_proj}.weight" in ended.out
    assert "are quantized to" in ended.out
    report = json.loads(moebius("plan", source, "--quantization", "int4", "--device", "cpu", "--json").out)
    assert report["quantized_bytes"] < report["target_bytes"] < report["bytes_to_read"]
