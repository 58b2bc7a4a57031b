"""Whole models on a card: what loads and generates there is what loads and generates on the host (`make test-gpu`)."""

import pytest
import torch

from moebius import AutoModelForCausalLM, BackendError
from moebius.config import SoftmaxTopK, SparseMoe
from moebius.experts.interface import Experts
from tests.families import TINY, tiny_config

pytestmark = pytest.mark.gpu


def test_a_shape_that_grouped_mm_cannot_take_is_refused_and_auto_takes_eager():
    config = SparseMoe(num_experts=4, top_k=2, intermediate_size=20, routing=SoftmaxTopK(renormalize=True))
    experts = Experts(config, hidden_size=64, experts_implementation="grouped_mm").to("cuda", torch.bfloat16)
    states = torch.zeros(3, 64, device="cuda", dtype=torch.bfloat16)
    index, weights = torch.zeros(3, 2, device="cuda", dtype=torch.int64), torch.zeros(3, 2, device="cuda")
    with pytest.raises(BackendError, match="multiples of 16"):
        experts(states, index, weights)
    experts.set_experts_implementation("auto")
    assert experts(states, index, weights).shape == (3, 64)


@pytest.mark.parametrize("family", TINY)
def test_a_checkpoint_loads_to_the_card_as_to_the_host(family, tmp_path):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    on_host = AutoModelForCausalLM.from_pretrained(tmp_path)
    on_card = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert on_card.device.type == "cuda"
    state = on_host.state_dict()
    assert all(torch.equal(value.cpu(), state[name]) for name, value in on_card.state_dict().items())
    on_card.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", TINY)
def test_the_card_generates_what_the_host_generates(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)  # far from ties
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    model.cuda()
    found = model.generate(ids.cuda(), attention_mask=mask.cuda(), **options)
    assert torch.equal(found.cpu(), expected)


def test_a_seed_repeats_itself_on_the_card():
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral")).eval().cuda()
    ids = torch.randint(3, 128, (2, 12), device="cuda")
    first, second = (model.generate(ids, do_sample=True, seed=3, max_new_tokens=8) for _ in range(2))
    assert torch.equal(first, second)
