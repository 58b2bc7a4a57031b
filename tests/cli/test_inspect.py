"""inspect and plan: all from headers, figures that can be checked by hand, faults refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius import AutoModelForCausalLM
from moebius.cli.inspect import count
from moebius.errors import CapacityError
from tests.families import tiny_config
from tests.quantized_folders import INT4_CONFIG, MXFP4_CONFIG, int4_pack, quantized_pair

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 32, 16, 4, 2, 512
ATTENTION = 2 * HIDDEN * 32 + 2 * HIDDEN * 16 + 2 * 8  # q and o, k and v, and their norms
ROUTED = 2 * EXPERTS * 3 * HIDDEN * INTERMEDIATE
REST = 2 * (ATTENTION + EXPERTS * HIDDEN + 2 * HIDDEN) + HIDDEN + 2 * VOCABULARY * HIDDEN
ACTIVE = REST + ROUTED * TOP_K // EXPERTS


def test_inspect_counts_parameters_bytes_and_cache(moebius, model):
    report = json.loads(moebius("inspect", model, "--json", "--ctx", 100, "--batch", 3).out)
    assert report["parameters"] == {"experts": ROUTED, "rest": REST, "total": ROUTED + REST, "active": ACTIVE}
    assert report["bytes"]["total"] == 4 * (ROUTED + REST)
    assert report["bytes_read_per_token"] == 4 * (ACTIVE - VOCABULARY * HIDDEN + HIDDEN)
    assert report["kv_cache"] == {"bytes_per_token": 2 * 2 * 2 * 8 * 4, "context": 100, "batch": 3, "bytes": 76800}
    assert (report["layers"], report["experts"], report["experts_per_token"]) == (2, 4, 2)
    assert report["layout"] == "per-expert layout"


def test_inspect_says_it_in_five_lines(moebius, model):
    lines = moebius("inspect", model).out.splitlines()
    assert lines[0] == (
        f"{model}  qwen3_moe, 2 layers, 4 experts, 2 a token; 45 tensors in 1 file, per-expert layout, complete"
    )
    assert [line.split()[0] for line in lines[1:]] == ["experts", "rest", "total", "active"]


def test_a_dtype_changes_bytes_and_not_parameters(moebius, model):
    whole, half = (
        json.loads(moebius("inspect", model, "--json", "--dtype", name).out) for name in ("float32", "bfloat16")
    )
    assert half["parameters"] == whole["parameters"]
    assert 2 * half["bytes"]["total"] == whole["bytes"]["total"]
    assert half["dtype"] == "bfloat16"


def test_keys_lists_every_stored_tensor(moebius, model):
    stored = load_file(Path(model) / "model.safetensors")
    report = json.loads(moebius("inspect", model, "--keys", "--json").out)
    assert {row["name"]: row["shape"] for row in report["tensors"]} == {
        name: list(tensor.shape) for name, tensor in stored.items()
    }
    lines = moebius("inspect", model, "--keys").out.splitlines()
    assert "  model.layers.1.mlp.experts.3.up_proj.weight  float32 [16, 32]  model.safetensors" in lines


def copy_with(model: str, folder: Path, **changes: torch.Tensor | None) -> Path:
    """The model's files in `folder`, tensors replaced, or left out where None; `__` in a name stands for a dot."""
    folder.mkdir()
    tensors = load_file(Path(model) / "model.safetensors")
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        del tensors[key]
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_missing_expert_is_refused_by_name(moebius, model, tmp_path, command):
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    ended = moebius(command, copy_with(model, tmp_path / "m", **{key.replace(".", "__"): None}))
    assert ended.code == 3
    assert key in ended.err
    assert ended.out == ""


def test_check_tensors_reads_weights_and_refuses_nan(moebius, model, tmp_path):
    broken = copy_with(model, tmp_path / "m", model__norm__weight=torch.full((HIDDEN,), float("nan")))
    assert moebius("inspect", broken).code == 0
    ended = moebius("inspect", broken, "--check-tensors")
    assert ended.code == 3
    assert "model.norm.weight" in ended.err
    assert "45 tensors were read: no NaN" in moebius("inspect", model, "--check-tensors").out


def test_plan_prints_the_plan_and_that_it_fits(moebius, model):
    ended = moebius("plan", model, "--device", "cpu")
    assert ended.code == 0
    assert "mlp.experts.*.{gate_proj,up_proj}.weight -> mlp.experts.gate_up_proj" in ended.out
    assert ended.out.endswith("fits on cpu\n")
    report = json.loads(moebius("plan", model, "--json", "--device", "cpu").out)
    assert (report["device"], report["fits"], report["skipped"]) == ("cpu", True, [])


def test_a_plan_that_does_not_fit_is_printed_and_ends_with_4(moebius, model, monkeypatch):
    def no_room(plan, device):
        raise CapacityError("needs more than there is")

    monkeypatch.setattr("moebius.checkpoint.loading.check_room", no_room)
    ended = moebius("plan", model, "--device", "cpu")
    assert ended.code == 4
    assert ended.out.endswith("does not fit on cpu\n")
    assert "needs more than there is" in ended.err


@pytest.mark.parametrize(
    ("parameters", "text"), [(28_991_029_248, "28.99 B"), (806_976, "806.98 k"), (1_500_000, "1.50 M"), (7, "7")]
)
def test_counts_are_written_as_the_field_does(parameters, text):
    assert count(parameters) == text


def test_json_holds_every_fault_however_many(moebius, model, tmp_path):
    norms = {key: None for path in Path(model).glob("*.safetensors") for key in load_file(path) if "layernorm" in key}
    ended = moebius("plan", str(copy_with(model, tmp_path / "broken", **norms)), "--json")
    report = json.loads(ended.out)
    assert ended.code == 3
    assert {fault["where"] for fault in report["faults"]} == set(norms)
    assert all(fault["what"] == "missing" for fault in report["faults"])
    assert report["error"] in ended.err


def test_a_config_alone_is_described_without_weights(moebius, model, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    for place in (tmp_path, tmp_path / "config.json"):
        report = json.loads(moebius("inspect", place, "--json").out)
        assert report["parameters"] == {"experts": ROUTED, "rest": REST, "total": ROUTED + REST, "active": ACTIVE}
        assert "its config alone, no weights" in moebius("inspect", place).out
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert moebius("inspect", tmp_path).code == 3


def test_the_published_form_of_a_config_alone_is_named(moebius, tmp_path):
    config = tiny_config("gpt_oss") | {"quantization_config": MXFP4_CONFIG}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "published as mxfp4, sizes are of plain weights" in moebius("inspect", tmp_path).out
    assert json.loads(moebius("inspect", tmp_path, "--json").out)["published_form"] == "mxfp4"


def test_forms_on_disk_and_in_memory_are_said_and_what_is_skipped(moebius, tmp_path):
    config = tiny_config("qwen3_moe")
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path / "made")
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    plain = load_file(tmp_path / "made/model.safetensors") | stray
    pair = quantized_pair(
        tmp_path, config, plain, lambda key, weight: int4_pack(weight) if ".experts." in key else None, INT4_CONFIG
    )
    lines = moebius("inspect", pair.quantized).out.splitlines()
    assert [line.split()[:2] for line in lines[5:]] == [["experts", "int4_pack"], ["rest", "float32"], ["skipped", "1"]]
    assert "kept so in memory" in lines[5]
    decoded = moebius("inspect", pair.quantized, "--dtype", "bfloat16").out.splitlines()
    assert "on disk, bfloat16" in decoded[5]
    report = json.loads(moebius("inspect", pair.quantized, "--json").out)
    experts = report["storage"][0]
    assert experts["disk_bytes"] == experts["memory_bytes"] == report["bytes"]["experts"]
    assert report["bytes"]["experts"] < 0.2 * 4 * report["parameters"]["experts"]
