"""Loading to a card: every way that bytes take gives the bits that the host gets; quantized weights run there."""

import pytest
import torch

from moebius import AutoModelForCausalLM, checkpoint
from moebius.checkpoint.loading import LoadOptions
from tests.checkpoint.folders import write
from tests.checkpoint.test_ways import assert_equal, expected, plan_of, stored
from tests.families import tiny_config
from tests.model_folders import ids_for, logits
from tests.quantized_folders import FP8_CONFIG, fp8_block, quantized_pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("options", [LoadOptions(), LoadOptions("sync"), LoadOptions(readers=3)], ids=str)
def test_casts_permutations_and_runs_arrive_as_they_are(tmp_path, options, dtype):
    tensors = stored()
    write(tmp_path, tensors, 3)
    found = checkpoint.load(plan_of(tmp_path, dtype), device="cuda", options=options)
    assert all(tensor.device.type == "cuda" for tensor in found.values())
    assert_equal({name: tensor.cpu() for name, tensor in found.items()}, expected(tensors), getattr(torch, dtype))


@pytest.mark.parametrize("dtype", [None, "float32"], ids=["kept", "decoded"])
def test_quantized_weights_give_the_hosts_logits(tmp_path, dtype):
    config = tiny_config("qwen3_moe")
    made = AutoModelForCausalLM.from_config(config, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "made")
    from tests.checkpoint.folders import read

    def encode(key, weight):
        return fp8_block(weight, (24, 20)) if weight.ndim == 2 and "proj" in key else None

    form = FP8_CONFIG | {"weight_block_size": [24, 20]}
    pair = quantized_pair(tmp_path, config, read(tmp_path / "made"), encode, form)
    on_card = AutoModelForCausalLM.from_pretrained(pair.quantized, dtype=dtype, device_map="cuda")
    on_host = AutoModelForCausalLM.from_pretrained(pair.quantized, dtype=dtype)
    ids = ids_for(on_host)
    assert (logits(on_card, ids.cuda()).cpu() - logits(on_host, ids)).abs().max() < 1e-3
    on_card.save_pretrained(tmp_path / "copy")
    if dtype is None:
        for path in pair.quantized.glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
