"""Published quantized forms: what they load to is what an independently decoded copy loads to, kept they are saved byte
for byte, decoded they become plain checkpoints that transformers opens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moebius import AutoModelForCausalLM, BackendError, CheckpointError, open_checkpoint
from tests.checkpoint.folders import read
from tests.families import make_oracle, save_oracle, tiny_config
from tests.model_folders import ids_for, logits, open_in_transformers
from tests.quantized_folders import (
    FP8_CONFIG,
    INT4_CONFIG,
    MXFP4_CONFIG,
    Form,
    Pair,
    fp8_block,
    int4_pack,
    mxfp4,
    quantized_pair,
)

BLOCK = (24, 20)  # divides none of the tiny widths: every matrix ends in partial blocks


class Published(NamedTuple):
    """A family in a form in which it is published.  encode: how a tensor of the hub's layout is stored."""

    family: str
    form: str
    encode: Callable[[str, torch.Tensor], Form | None]
    quantization_config: dict[str, Any]


def every_linear(key: str, weight: torch.Tensor) -> Form | None:
    """As DeepSeek-V3 and its heirs: all but norms, embedding, head and router."""
    plain = weight.ndim != 2 or any(part in key for part in ("embed_tokens", "lm_head", "mlp.gate.", "moe.gate."))
    return None if plain else fp8_block(weight, BLOCK)


def routed_experts(key: str, weight: torch.Tensor) -> Form | None:
    """As Kimi-K2-Thinking."""
    return int4_pack(weight) if ".experts." in key else None


def packed_experts(key: str, weight: torch.Tensor) -> Form | None:
    """As gpt-oss, from its plain layout [E, in, out]."""
    if not key.endswith((".gate_up_proj", ".down_proj")):
        return None
    form = mxfp4(weight.transpose(1, 2))
    return Form(form.stored, form.meaning.transpose(1, 2))


FP8 = FP8_CONFIG | {"weight_block_size": list(BLOCK)}
PUBLISHED = {
    "gpt_oss-mxfp4": Published("gpt_oss", "mxfp4", packed_experts, MXFP4_CONFIG),
    "deepseek_v3-fp8": Published("deepseek_v3", "fp8_block", every_linear, FP8),
    "glm4_moe-fp8": Published("glm4_moe", "fp8_block", every_linear, FP8),
    "minimax_m2-fp8": Published("minimax_m2", "fp8_block", every_linear, FP8 | {"fmt": "float8_e4m3fn"}),
    "qwen3_moe-fp8": Published("qwen3_moe", "fp8_block", every_linear, FP8),
    "kimi_k2-int4": Published("kimi_k2", "int4_pack", routed_experts, INT4_CONFIG),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> folders of the quantized checkpoint and of the plain one that it stands for, each made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            published, folder = PUBLISHED[name], tmp_path_factory.mktemp(name)
            hub = save_oracle(make_oracle(published.family), folder / "oracle")
            config = tiny_config(published.family)
            made[name] = quantized_pair(folder, config, read(hub), published.encode, published.quantization_config)
        return made[name]

    return get


def opened(folder: Path, **options: Any) -> Any:
    """Copied, not mapped: products of weights that are aligned otherwise may differ in their last bit."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", mapping="never", **options)


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_decoded_in_the_stream_it_is_the_plain_checkpoint_bit_for_bit(pairs, name):
    quantized, plain = (opened(folder, dtype="float32") for folder in pairs(name))
    assert set(quantized.plan.encoded.values())
    for (ours, found), (theirs, expected) in zip(
        quantized.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert ours == theirs
        assert torch.equal(found, expected), ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plain_checkpoint_gives_transformers_logits(pairs, name):
    oracle, model = open_in_transformers(pairs(name).plain), opened(pairs(name).plain)
    ids = ids_for(model)
    with torch.no_grad():
        assert furthest(logits(model, ids), oracle(ids).logits) < 5e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_kept_in_its_form_it_gives_the_plain_checkpoints_logits(pairs, name):
    kept, plain = (opened(folder) for folder in pairs(name))
    assert {form.name for form in kept.source.held.values()} == {PUBLISHED[name].form}
    ids = ids_for(kept)
    assert furthest(logits(kept, ids), logits(plain, ids)) < 1e-5
    assert kept.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_kept_it_takes_fewer_bytes_and_is_saved_byte_for_byte(pairs, name, tmp_path):
    kept, plain = (opened(folder) for folder in pairs(name))
    assert kept.plan.target_bytes < 0.75 * plain.plan.target_bytes
    kept.save_pretrained(tmp_path)
    for path in sorted(pairs(name).quantized.glob("*.safetensors*")):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_decoded_it_is_saved_as_a_plain_checkpoint(pairs, name, tmp_path):
    opened(pairs(name).quantized, dtype="float32").save_pretrained(tmp_path)
    assert {key: t.shape for key, t in read(tmp_path).items()} == {
        key: t.shape for key, t in read(pairs(name).plain).items()
    }
    ids = ids_for(again := opened(tmp_path))
    assert not again.source.held
    assert torch.equal(logits(again, ids), logits(opened(pairs(name).plain), ids))
    assert furthest(open_in_transformers(tmp_path)(ids).logits, logits(again, ids)) < 5e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_auto_backend_runs_what_is_kept(pairs, name):
    kept = AutoModelForCausalLM.from_pretrained(pairs(name).quantized)
    ids = ids_for(kept)
    assert furthest(logits(kept, ids), logits(opened(pairs(name).plain), ids)) < 5e-5
    out = kept.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)


@pytest.mark.parametrize("name", ["gpt_oss-mxfp4", "deepseek_v3-fp8", "kimi_k2-int4"])
def test_gradients_flow_through_kept_weights_to_what_is_plain(pairs, name):
    kept, plain = (opened(folder) for folder in pairs(name))
    ids = ids_for(kept)
    for model in (kept, plain):
        model(ids, labels=ids).loss.backward()
    ours, theirs = (dict(model.named_parameters()) for model in (kept, plain))
    trained = [key for key, parameter in ours.items() if parameter.requires_grad]
    assert "model.embed_tokens.weight" in trained
    for key in trained:
        grad, bound = theirs[key].grad, 1e-5 * max(1.0, theirs[key].grad.abs().max().item())
        assert furthest(ours[key].grad, grad) < bound, key


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_a_named_backend_that_takes_plain_weights_is_refused_before_a_weight_is_read(pairs, backend, monkeypatch):
    monkeypatch.setattr("moebius.checkpoint.load", None)
    with pytest.raises(BackendError, match=r'held as mxfp4.*\n.*dtype="bfloat16", which decodes'):
        AutoModelForCausalLM.from_pretrained(pairs("gpt_oss-mxfp4").quantized, experts_implementation=backend)
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(
        pairs("gpt_oss-mxfp4").quantized, dtype="float32", experts_implementation=backend
    )
    assert model(ids_for(model)).logits.isfinite().all()


def test_a_quantized_weight_that_can_only_be_held_plain_is_refused_by_name_and_decoded_if_asked(tmp_path):
    config = tiny_config("qwen3_moe")
    hub = read(save_oracle(make_oracle("qwen3_moe"), tmp_path / "oracle"))
    pair = quantized_pair(
        tmp_path, config, hub, lambda key, weight: fp8_block(weight, BLOCK) if "gate." in key else None, FP8
    )
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.gate.weight: stored quantized.*\n.*") as caught:
        opened(pair.quantized)
    assert "decodes all of them" in str(caught.value)
    ids = ids_for(decoded := opened(pair.quantized, dtype="float32"))
    assert torch.equal(logits(decoded, ids), logits(opened(pair.plain), ids))


def test_a_decoded_save_describes_what_is_there(pairs, tmp_path):
    opened(pairs("deepseek_v3-fp8").quantized, dtype="float32").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    assert saved["num_nextn_predict_layers"] == 0  # such layers are not written


def test_a_plan_says_what_is_decoded(pairs):
    plan = str(open_checkpoint(pairs("gpt_oss-mxfp4").quantized, dtype="bfloat16").plan)
    assert "mxfp4 -> bfloat16" in plan


def test_scales_of_one_expert_that_are_missing_are_named_before_any_read(pairs, tmp_path):
    from tests.checkpoint.folders import write

    source = pairs("deepseek_v3-fp8").quantized
    key = next(key for key in read(source) if ".experts.3.up_proj.weight_scale_inv" in key)
    write(tmp_path, {name: tensor for name, tensor in read(source).items() if name != key})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no weight was read") as caught:
        opened(tmp_path)
    assert any(key.removesuffix("_scale_inv") in fault.where for fault in caught.value.faults)
