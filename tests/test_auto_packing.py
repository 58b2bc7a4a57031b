"""`quantization=`: a plain checkpoint becomes a quantized model while it is read, in bounded memory; what is asked
of it is done or refused by name.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import ArgumentError, AutoModelForCausalLM, open_checkpoint
from moebius.layers.quantizing import segments_of
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.decoding import dequantize, quantize
from tests.checkpoint.folders import read
from tests.families import make_oracle, save_oracle, tiny_config
from tests.model_folders import ids_for, logits
from tests.quantized_folders import INT4_CONFIG, int4_pack, quantized_pair

FORMS = ("int8", "int4", "fp8", "mxfp4")
WIDE = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "intermediate_size": 64}  # for groups of 32
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "gpt_oss": {}, "deepseek_v3": WIDE}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a plain checkpoint in the hub's layout, made once, in float32."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            oracle = make_oracle(family, **FAMILIES.get(family, {}))
            made[family] = save_oracle(oracle, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def opened(folder: Path, **options: Any) -> Any:
    """Copied, not mapped: products of weights that are aligned otherwise may differ in their last bit."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", mapping="never", **options)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@every_family
@every_form
def test_it_holds_the_bits_of_the_loaded_weights_quantized(folders, family, form):
    packed, plain = opened(folders(family), quantization=form), opened(folders(family))
    tensors, weights = packed.state_dict(), plain.state_dict()
    assert len(packed.source.held) >= 4
    for name, held in packed.source.held.items():
        values, scales = quantize(held, weights[name], segments_of(name))
        assert same_bits(tensors[name], values), name
        assert same_bits(tensors[f"{name}_scale"], scales), name
    for name in weights.keys() - packed.source.held.keys():
        assert same_bits(tensors[name], weights[name]), name


@every_family
@every_form
def test_its_logits_are_those_of_the_plain_model_with_the_same_losses(folders, family, form):
    packed, plain = opened(folders(family), quantization=form), opened(folders(family))
    tensors, decoded = packed.state_dict(), plain.state_dict()
    for name, held in packed.source.held.items():
        scales = tensors[f"{name}_scale"]
        decoded[name] = dequantize(held, tensors[name], scales, torch.float32, segments_of(name))
    ids, before = ids_for(plain), logits(plain, ids_for(plain))
    plain.load_state_dict(decoded)
    assert (logits(packed, ids) - logits(plain, ids)).abs().max() < 1e-5
    assert (logits(packed, ids) - before).abs().max() > 1e-2


def test_router_gates_norms_embedding_and_head_stay_plain(folders, tmp_path):
    qwen2 = save_oracle(make_oracle("qwen2_moe", intermediate_size=64, shared_expert_intermediate_size=64), tmp_path)
    held = set(open_checkpoint(qwen2, quantization=QuantizationConfig("int4")).held)
    assert {name.split(".", 3)[3] for name in held} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_parts_and_modules_that_stay_plain_can_be_named(folders):
    def held(**fields: Any) -> set[str]:
        return set(open_checkpoint(folders("deepseek_v3"), quantization=QuantizationConfig("int8", **fields)).held)

    everything, experts, linears = held(), held(parts=["experts"]), held(parts=["linears"])
    assert experts | linears == everything
    assert experts == {name for name in everything if ".mlp.experts." in name}
    without = held(modules_to_not_convert=["self_attn", "layers.*.mlp.shared_expert", "model.layers.2", "lm_head"])
    assert without == {
        name
        for name in everything
        if not any(part in name for part in ("self_attn", "mlp.shared_expert.", "layers.2."))
    }


def test_a_config_says_more_than_a_name(folders):
    config = {"form": "int4", "group_size": 16, "parts": ["experts"]}
    model = opened(folders("qwen3_moe"), quantization_config=config)
    assert {form.group_size for form in model.source.held.values()} == {16}
    assert opened(folders("qwen3_moe"), quantization="int4", quantization_config={"group_size": 16}).source.held


def test_what_stays_plain_takes_the_dtype_that_is_asked_for(folders):
    model = opened(folders("qwen3_moe"), quantization="int8", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes["model.norm.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.mlp.experts.down_proj"] == torch.int8
    whole = opened(folders("qwen3_moe"), quantization="int8").state_dict()
    assert same_bits(
        model.state_dict()["model.layers.0.mlp.experts.down_proj"], whole["model.layers.0.mlp.experts.down_proj"]
    )


def test_a_checkpoint_in_another_form_is_decoded_and_quantized(tmp_path):
    def routed_experts(key: str, weight: torch.Tensor):
        return int4_pack(weight) if ".experts." in key else None

    hub = save_oracle(make_oracle("kimi_k2", **WIDE), tmp_path / "hub")
    pair = quantized_pair(tmp_path, tiny_config("kimi_k2", **WIDE), read(hub), routed_experts, INT4_CONFIG)
    ours, plain = (opened(folder, quantization="fp8").state_dict() for folder in pair)
    for name, tensor in plain.items():  # as numbers: the plain one has negative zeros
        assert torch.equal(ours[name].float(), tensor.float()), name
    with pytest.raises(ArgumentError, match="quantized already"):
        opened(pair.quantized, quantization="int4")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantization": "int3"}, "form='int3'"),
        ({"quantization": "int8", "quantization_config": {"form": "int4"}}, "contradict"),
        ({"quantization_config": {"group_size": 32}}, "form: missing"),
        ({"quantization_config": object()}, "builtins.object is not read"),
        ({"quantization_config": {"form": "int8", "modules_to_not_convert": ["mlp.exprts"]}}, "mlp.exprts: no such"),
        ({"quantization_config": {"form": "int8", "modules_to_not_convert": ["layers"]}}, "nothing is left"),
        ({"load_in_4bit": True}, 'say quantization="int4"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(folders, options, told):
    with pytest.raises(ArgumentError, match=told):
        opened(folders("qwen3_moe"), **options)


def test_every_width_that_no_group_divides_is_named_before_any_read(tmp_path):
    narrow = save_oracle(make_oracle("deepseek_v3"), tmp_path)
    with pytest.raises(ArgumentError, match="cannot be quantized to int4") as caught:
        opened(narrow, quantization="int4")
    named = {fault.where.split(".", 3)[3] for fault in caught.value.faults}
    assert named == {f"self_attn.{part}_proj.weight" for part in ("q_b", "kv_b", "o")} | {"mlp.down_proj.weight"}


def test_a_model_without_weights_to_quantize_is_refused(tmp_path):
    dense = save_oracle(make_oracle("qwen2"), tmp_path)
    with pytest.raises(ArgumentError, match="nothing is left"):
        opened(dense, quantization_config={"form": "int8", "parts": ["experts"]})


def test_a_quantized_model_runs_generates_and_passes_gradients_to_what_is_plain(folders):
    model = AutoModelForCausalLM.from_pretrained(folders("gpt_oss"), quantization="mxfp4")
    ids = ids_for(model)
    assert model.generate(ids[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert model.num_parameters() == opened(folders("gpt_oss")).num_parameters()


MEASURE = """
import sys, threading, time
import torch
from moebius import AutoModelForCausalLM

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization=sys.argv[3])  # what is allocated once and for all
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous() - before)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization=sys.argv[3])
done = True
watcher.join()
print(peak, model.plan.target_bytes, model.plan.peak_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@every_form
def test_memory_never_holds_more_than_the_quantized_model_and_a_little(folders, tmp_path, family, form):
    sizes = {"qwen3_moe": {"moe_intermediate_size": 512, "num_experts": 32}, "gpt_oss": {"num_local_experts": 17}}
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "torch_dtype": "bfloat16", **sizes[family]}
    AutoModelForCausalLM.from_config(tiny_config(family, **wide)).save_pretrained(tmp_path / "large")
    assert open_checkpoint(tmp_path / "large").plan.target_bytes > 200e6
    arguments = [sys.executable, "-W", "ignore", "-c", MEASURE, tmp_path / "large", folders(family), form]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peak, target, planned = map(int, ended.stdout.split())
    assert peak < min(1.02 * target + 64e6, planned)
