"""Quantized while it is read, onto a card: the bits that the host gets (`make test-gpu`)."""

import pytest
import torch

from moebius import AutoModelForCausalLM, CheckpointError
from moebius.checkpoint import load
from moebius.checkpoint.loading import LoadOptions
from moebius.quantization.forms import PackedInt4
from tests.checkpoint.folders import write
from tests.checkpoint.test_packing import PACK, assert_quantized, every_form, packing, per_expert, same_bits, weight
from tests.families import tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_a_card_holds_the_bits_that_the_host_holds(family, form, tmp_path):
    config = tiny_config(family, hidden_size=256, torch_dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    on_host = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form).state_dict()
    on_card = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form, device_map="cuda").state_dict()
    for name, tensor in on_host.items():
        assert torch.equal(on_card[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [LoadOptions(), LoadOptions("sync"), LoadOptions(readers=3)], ids=str)
def test_matrices_in_windows_hold_the_bits_that_the_whole_weight_would(form, dtype, options, tmp_path, monkeypatch):
    monkeypatch.setattr("moebius.checkpoint.packing_batches.WINDOW_BYTES", 24_000)
    whole = weight(dtype)
    plan = packing(write(tmp_path, per_expert(whole), shards=3), PACK, form)
    found = load(plan, device="cuda", options=options)
    assert_quantized({name: tensor.cpu() for name, tensor in found.items()}, form, whole)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_transposed_matrices_larger_than_a_slot_are_quantized_too(form, tmp_path):
    config = tiny_config(
        "gpt_oss", hidden_size=2048, intermediate_size=2048, num_local_experts=4, torch_dtype="bfloat16"
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    on_host = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form).state_dict()
    on_card = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form, device_map="cuda").state_dict()
    assert all(same_bits(on_card[name].cpu(), tensor) for name, tensor in on_host.items())


def test_a_card_finds_nan_if_it_is_looked_for(tmp_path):
    whole = weight()
    whole[1, 50, 3] = torch.nan
    plan = packing(write(tmp_path, per_expert(whole)), PACK, PackedInt4())
    load(plan, device="cuda")
    with pytest.raises(CheckpointError, match=r"experts.1.up_proj.weight: NaN"):
        load(plan, device="cuda", check_tensors=True)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_the_card_never_holds_much_more_than_the_quantized_model(form, tmp_path):
    config = tiny_config(
        "qwen3_moe", hidden_size=2048, moe_intermediate_size=768, num_experts=64, torch_dtype="bfloat16"
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization=form, device_map="cuda")
    assert torch.cuda.max_memory_allocated() - before < 1.02 * model.plan.target_bytes + 256e6
