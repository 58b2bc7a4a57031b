"""Quantized while it is read, onto a card: the bits that the host gets (`make test-gpu`)."""

import pytest
import torch

from moebius import AutoModelForCausalLM
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
