"""Models split between cards and the host: they load, run, train and are saved as on the host alone."""

import pytest
import torch

from moebius import AutoModelForCausalLM, CapacityError
from moebius.checkpoint import loading
from moebius.placement import parts_of
from tests.families import TINY, randomize, tiny_config
from tests.model_folders import ids_for

pytestmark = pytest.mark.gpu

TWO_CARDS = {0: "1GiB", 1: "1GiB"}  # there may be more
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SPLITS = {
    "layers on the card": {"model.embed_tokens": "cpu", "model.layers": 0, "model.norm": "cpu", "lm_head": "cpu"},
    "head on the host": {"model": 0, "lm_head": "cpu"},
    "last layer on the host": {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "lm_head": 0,
    },
    "there and back": {
        "model.embed_tokens": 0,
        "model.layers.0": "cpu",
        "model.layers.1": 0,
        "model.norm": "cpu",
        "lm_head": 0,
    },
}
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "qwen2")  # of two layers


@pytest.fixture
def folder(tmp_path):
    def made(family, **changes):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        randomize(model, seed=0)
        model.save_pretrained(tmp_path / family)
        return tmp_path / family

    return made


def assert_runs_as_on_the_host(model, folder):
    """Logits and losses within float32's noise, greedy tokens alike, with and without padding."""
    host = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = ids_for(host)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    with torch.no_grad():
        for given in (None, mask):
            there = None if given is None else given.to(model.device)
            wanted = host(input_ids, given, labels=input_ids, output_router_logits=True)
            found = model(
                input_ids.to(model.device), there, labels=input_ids.to(model.device), output_router_logits=True
            )
            assert found.logits.device == found.loss.device == model.device
            real = slice(5, None) if given is not None else slice(None)
            torch.testing.assert_close(found.logits.cpu()[:, real], wanted.logits[:, real], rtol=0, atol=2e-3)
            torch.testing.assert_close(found.loss.cpu(), wanted.loss, rtol=1e-4, atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids, **options), host.generate(input_ids, **options))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_split_between_card_and_host_runs_as_on_the_host(family, split, folder):
    path = folder(family)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=split)
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in model.state_dict().items())
    assert_runs_as_on_the_host(model, path)


@pytest.mark.parametrize("family", TINY)
def test_auto_spreads_every_family_by_its_bytes(family, folder):
    path = folder(family)
    plan = AutoModelForCausalLM.from_pretrained(path, device_map="meta").plan
    embedding, first, *_ = parts_of(plan).values()
    limits = {0: embedding + first, "cpu": "1GB"}
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", max_memory=limits)
    assert (model.hf_device_map["model.layers.0"], model.hf_device_map["model.layers.1"]) == (0, "cpu")
    assert_runs_as_on_the_host(model, path)


def test_auto_takes_the_card_alone_where_all_fits(folder):
    assert AutoModelForCausalLM.from_pretrained(folder("qwen3_moe"), device_map="auto").hf_device_map == {"": 0}


def test_a_tied_head_works_where_the_embedding_is(folder):
    path = folder("qwen3_moe", tie_word_embeddings=True)
    split = {"model.embed_tokens": 0, "model.layers": "cpu", "model.norm": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=split)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_runs_as_on_the_host(model, path)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_what_is_split_is_saved_as_it_was(split, folder, tmp_path):
    path = folder("qwen3_moe")
    AutoModelForCausalLM.from_pretrained(path, device_map=split).save_pretrained(tmp_path / "copy")
    for file in path.glob("*.safetensors"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_gradients_cross_from_device_to_device(folder):
    path = folder("qwen3_moe")
    host = AutoModelForCausalLM.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=SPLITS["there and back"])
    input_ids = ids_for(host)
    for one in (host, model):
        there = input_ids.to(one.device)
        one(there, labels=there, output_router_logits=True).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in host.named_parameters():
        torch.testing.assert_close(found[name].cpu(), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"loading": "sync"}, {"mapping": "never"}], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_every_way_of_loading_fills_both_devices(options, quantization, folder):
    path = folder("qwen3_moe")
    options = options | {"quantization": quantization}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=SPLITS["last layer on the host"], **options)
    alone = {kind: AutoModelForCausalLM.from_pretrained(path, device_map=kind, **options) for kind in ("cpu", "cuda")}
    wanted = {kind: one.state_dict() for kind, one in alone.items()}
    assert all(torch.equal(tensor, wanted[tensor.device.type][name]) for name, tensor in model.state_dict().items())


def test_what_a_card_cannot_take_is_said_before_a_weight_is_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "_free_bytes", lambda device: 1000 if device.type == "cuda" else 1 << 40)
    with pytest.raises(CapacityError, match="on cuda:0, 1,000 are free; no weight was read"):
        AutoModelForCausalLM.from_pretrained(folder("qwen3_moe"), device_map=SPLITS["head on the host"])


@two_cards
@pytest.mark.parametrize("options", [{}, {"loading": "sync"}], ids=str)
@pytest.mark.parametrize("family", TINY)
def test_two_cards_run_as_the_host(family, options, folder):
    path = folder(family)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="balanced", max_memory=TWO_CARDS, **options)
    assert set(model.hf_device_map.values()) == {0, 1}
    assert torch.cuda.current_device() == 0
    assert_runs_as_on_the_host(model, path)


@two_cards
def test_a_second_card_can_be_the_only_one(folder):
    path = folder("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cuda:1", loading="sync")
    assert model.hf_device_map == {"": 1}
    assert torch.cuda.current_device() == 0
    assert_runs_as_on_the_host(model, path)


@two_cards
def test_three_devices_in_turn(folder):
    path = folder("qwen3_moe")
    split = {"model.embed_tokens": 1, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 1, "lm_head": 0}
    assert_runs_as_on_the_host(AutoModelForCausalLM.from_pretrained(path, device_map=split), path)
