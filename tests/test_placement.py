"""Where a model's parts go: every part on one device, in order, within its room; and layers that follow their devices.

Devices are named here that this machine need not have: placing is arithmetic, and a forward runs on fake tensors.
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moebius import ArgumentError, AutoModelForCausalLM, CapacityError, checkpoint
from moebius.arguments import device_map_of
from moebius.checkpoint import loading
from moebius.checkpoint.loading import check_room, needed_bytes
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS
from moebius.generation.cache import KeyValueCache
from moebius.layers import decoder as decoder_module
from moebius.placement import (
    STRATEGIES,
    Modules,
    Strategy,
    by_modules,
    hf_device_map,
    parts_of,
    place,
    rank_shares,
    split,
)
from tests.checkpoint.folders import numbered, planned, targets, write
from tests.families import tiny_config
from tests.layers.test_decoder import ids, tiny_decoder

GPUS = ("cuda:0", "cuda:1", "cuda:2")
LAYERS = {f"model.layers.{number}": 10 for number in range(8)}
PARTS = {"model.embed_tokens": 20, **LAYERS, "model.norm": 1, "lm_head": 20}
"""A model of 121 bytes."""


def spread(name, *rooms, cpu=10_000, parts=PARTS):
    """{device: its parts, in order}, with so much room on each GPU, and on the host."""
    limits = {**dict(zip(GPUS, rooms, strict=False)), "cpu": cpu}
    placed = split(parts, Strategy(name, list(limits), limits), free=lambda device: None)
    assert list(placed) == list(parts)
    return {device: [part for part in parts if placed[part] == device] for device in dict.fromkeys(placed.values())}


def sizes(found):
    return {device: sum(PARTS[part] for part in parts) for device, parts in found.items()}


# --- spreading ---


def test_auto_takes_one_gpu_where_one_can_take_all():
    assert sizes(spread("auto", 121, 500)) == {"cuda:0": 121}
    assert sizes(spread("auto", 120, 500)) == {"cuda:1": 121}


def test_auto_spreads_evenly_where_one_is_not_enough():
    assert sizes(spread("auto", 100, 100)) == {"cuda:0": 60, "cuda:1": 61}
    assert sizes(spread("auto", 100, 100, 100)) == {"cuda:0": 40, "cuda:1": 40, "cuda:2": 41}


def test_balanced_uses_every_gpu_though_one_would_do():
    assert sizes(spread("balanced", 500, 500)) == {"cuda:0": 60, "cuda:1": 61}


def test_sequential_fills_each_gpu_before_the_next():
    assert sizes(spread("sequential", 100, 500)) == {"cuda:0": 100, "cuda:1": 21}
    assert sizes(spread("sequential", 500, 500)) == {"cuda:0": 121}


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_the_gpus_cannot_take_goes_to_the_host(name):
    found = spread(name, 45, 30)
    assert sizes(found) == {"cuda:0": 40, "cuda:1": 30, "cpu": 51}
    assert found["cpu"] == ["model.layers.5", "model.layers.6", "model.layers.7", "model.norm", "lm_head"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_a_gpu_all_is_on_the_host(name):
    assert sizes(spread(name)) == {"cpu": 121}


@pytest.mark.parametrize("name", STRATEGIES)
def test_limits_that_are_too_small_for_the_model_are_refused(name):
    with pytest.raises(CapacityError, match=r"121 bytes do not fit within the limits"):
        spread(name, 45, 30, cpu=50)


@given(
    name=st.sampled_from(STRATEGIES),
    nbytes=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    rooms=st.lists(st.integers(0, 300), max_size=3),
)
def test_each_part_is_on_one_device_in_order_within_its_room(name, nbytes, rooms):
    parts = {f"model.layers.{number}": size for number, size in enumerate(nbytes)}
    found = spread(name, *rooms, parts=parts)
    assert [part for mine in found.values() for part in mine] == list(parts)
    assert list(found) == sorted(found, key=[*GPUS, "cpu"].index)
    for device, mine in found.items():
        assert device == "cpu" or sum(parts[part] for part in mine) <= rooms[GPUS.index(device)]


@given(nbytes=st.lists(st.integers(1, 50), min_size=2, max_size=10))
def test_no_cut_in_two_is_more_even_than_the_balanced_one(nbytes):
    parts = {f"model.layers.{number}": size for number, size in enumerate(nbytes)}
    found = spread("balanced", 10_000, 10_000, parts=parts)
    fullest = max(sum(parts[part] for part in mine) for mine in found.values())
    assert fullest == min(max(sum(nbytes[:cut]), sum(nbytes[cut:])) for cut in range(len(nbytes) + 1))


@pytest.mark.parametrize(("nbytes", "free"), [(90 << 30, 100 << 30), (4 << 30, 5 << 30)])
def test_a_gpu_without_a_limit_keeps_a_tenth_free_and_a_gibibyte_at_least(nbytes, free):
    def device(free):
        return split({"model.norm": nbytes}, Strategy("auto", ["cuda:0", "cpu"], {}), lambda device: free)["model.norm"]

    assert device(free) == "cuda:0"
    assert device(free - 16) == "cpu"


def test_gpus_that_are_not_needed_are_not_asked():
    def free(device):
        assert device == "cuda:0"
        return 8 << 30

    assert set(split(PARTS, Strategy("auto", [*GPUS, "cpu"], {}), free).values()) == {"cuda:0"}


# --- a device a module ---


@pytest.mark.parametrize(
    "modules",
    [
        {"": "cuda:0"},
        {"model": "cuda:0", "lm_head": "cpu"},
        {**dict.fromkeys(PARTS, "cuda:1"), "lm_head": "cpu", "model.rotary_emb": "cuda:1"},
        {"model.embed_tokens": "cpu", "model.layers": "cuda:0", "model.norm": "cpu", "lm_head": "cpu"},
    ],
)
def test_names_may_be_of_parts_or_of_what_holds_them(modules):
    found = by_modules(list(PARTS), modules, {})
    for part, device in found.items():
        assert device in [modules[name] for name in modules if name in ("", part) or part.startswith(f"{name}.")]


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({"model": "cpu"}, "lm_head: on no device"),
        ({"model": "cpu", "lm_head": "cpu", "model.layers.3": "cuda:0"}, "model.layers.3: named twice"),
        ({"": "cpu", "model.layers.9": "cpu"}, "model.layers.9: unknown module: did you mean model.layers."),
        ({"": "cpu", "vision": "cpu"}, "vision: unknown module: the model has none"),
        ({"": "cpu", "model.layers.1.mlp": "cuda:0"}, "model.layers.1.mlp: within a part"),
        ({"model": "meta", "lm_head": "cpu"}, "all of a model is, or none"),
    ],
)
def test_names_that_do_not_cover_each_part_once_are_refused(modules, says):
    with pytest.raises(ArgumentError) as caught:
        by_modules(list(PARTS), modules, {})
    assert says in str(caught.value)


def test_a_tied_head_goes_with_its_embedding():
    parts, ties = [part for part in PARTS if part != "lm_head"], {"lm_head": "model.embed_tokens"}
    assert "lm_head" not in by_modules(parts, {"model": "cuda:0", "lm_head": "cuda:0"}, ties)
    assert by_modules(parts, {"model": "cuda:0"}, ties)
    with pytest.raises(ArgumentError, match="tied weight on two devices"):
        by_modules(parts, {"model": "cuda:0", "lm_head": "cpu"}, ties)


# --- ranks ---


def experts_of(counts: dict[str, int], folder) -> checkpoint.Plan:
    """A plan of layers with so many experts of 24 bytes each, and a norm of 12."""
    shapes = {f"model.layers.{layer}.mlp.experts.w": (count, 2, 3) for layer, count in counts.items()}
    wanted = targets(**shapes, **{"model.norm.weight": (3,)})
    return planned(write(folder, {target.name: numbered(*target.shape) for target in wanted}), [], wanted)


def test_each_rank_holds_its_share_of_every_layers_experts_and_all_of_the_rest(tmp_path):
    plan = experts_of({"0": 5, "1": 3}, tmp_path)
    shares = rank_shares(plan, 4)
    assert [share.holds for share in shares] == [12 + 24 * experts for experts in (3, 2, 2, 1)]
    assert [share.reads for share in shares] == [share.holds for share in shares]
    assert rank_shares(plan, 1)[0].reads == plan.bytes_to_read


def test_of_more_ranks_than_experts_some_hold_the_rest_alone(tmp_path):
    assert [share.holds for share in rank_shares(experts_of({"0": 2}, tmp_path), 3)] == [36, 36, 12]


# --- as arguments ---


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs of 1 GiB and as much more as is set, as far as counting and asking them goes."""
    room = {"cuda:0": 0, "cuda:1": 0}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(loading, "_free_bytes", lambda device: (1 << 30) + room.get(str(device), 1 << 40))
    return room


@pytest.mark.parametrize(
    ("device_map", "modules"),
    [
        (None, {"": "cpu"}),
        ("cuda", {"": "cuda:1"}),
        (0, {"": "cuda:0"}),
        (torch.device("cuda", 1), {"": "cuda:1"}),
        ({"": "cuda:0"}, {"": "cuda:0"}),
        ({"model": 0, "lm_head": "cpu"}, {"model": "cuda:0", "lm_head": "cpu"}),
        ({"model": 0, "lm_head": torch.device("cuda")}, {"model": "cuda:0", "lm_head": "cuda:1"}),
    ],
)
def test_devices_are_spelled_out(two_gpus, device_map, modules):
    assert device_map_of(device_map) == Modules(modules)


def test_max_memory_says_which_devices_and_how_much(two_gpus):
    found = device_map_of("auto", {"cpu": "1536MiB", 1: 7, "cuda:0": "10GB"})
    limits = {"cuda:0": 10**10, "cuda:1": 7, "cpu": 3 << 29}
    assert found == Strategy("auto", list(limits), limits)
    assert list(found.limits) == list(limits)
    assert device_map_of("sequential") == Strategy("sequential", ["cuda:0", "cuda:1", "cpu"], {})


@pytest.mark.parametrize(
    ("device_map", "max_memory", "says"),
    [
        ({"model": 2, "lm_head": 3}, None, ["device_map=2: not there", "device_map=3: not there: torch sees 2"]),
        ({"model": "disk"}, None, ["device_map='disk'"]),
        ("mps", None, ["mps is not supported"]),
        ("cpu", {"cpu": 7}, ["max_memory is for device_map='auto'"]),
        ("auto", {2: "1GB"}, ["max_memory=2: not there"]),
        ("auto", {"disk": "1GB"}, ["max_memory='disk'"]),
        ("auto", {0: "1 pound"}, ["max_memory='1 pound'"]),
    ],
)
def test_devices_and_limits_that_mean_nothing_are_refused(two_gpus, device_map, max_memory, says):
    with pytest.raises(ArgumentError) as caught:
        device_map_of(device_map, max_memory)
    assert all(words in str(caught.value) for words in says)


# --- a model's own plan ---


@pytest.fixture
def folder(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_plans_parts_hold_all_its_bytes_in_order(family, tmp_path):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    layers = [f"model.layers.{number}" for number in range(len(model.config.layers))]
    assert list(parts_of(model.plan)) == ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    assert sum(parts_of(model.plan).values()) == model.plan.target_bytes


def test_a_tied_model_has_no_part_for_its_head(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("qwen2", tie_word_embeddings=True)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "cpu"})
    assert "lm_head" not in parts_of(model.plan)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_loaded_model_says_where_it_is(folder):
    assert AutoModelForCausalLM.from_pretrained(folder, device_map="auto").hf_device_map == {"": "cpu"}
    assert AutoModelForCausalLM.from_pretrained(folder, device_map="meta").hf_device_map == {"": "meta"}
    devices = {
        "model.layers.0.mlp.gate.weight": "cuda:1",
        "model.layers.0.norm.weight": "cuda:1",
        "lm_head.weight": "cpu",
    }
    assert hf_device_map(devices) == {"model.layers.0": 1, "lm_head": "cpu"}


def test_limits_hold_for_a_load(folder):
    with pytest.raises(CapacityError, match=r"limit: 1,000 bytes"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": 1000})
    found = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GB"})
    assert found.hf_device_map == {"": "cpu"}


# --- loading ---


def test_each_tensor_is_sent_to_its_own_device(tmp_path, monkeypatch):
    tensors = {"here": numbered(30, 40), "there": numbered(50), "beyond": numbered(7)}
    plan = planned(write(tmp_path, tensors), [], targets(here=(30, 40), there=(50,), beyond=(7,)))
    sent = {}

    def send(self, todo, device):
        sent[str(device)] = {job.target for job in todo}

    monkeypatch.setattr(loading._Loader, "_send", send)
    loaded = checkpoint.load(plan, device={"here": "cpu", "there": "meta", "beyond": "meta:1"})
    assert torch.equal(loaded["here"], tensors["here"])
    assert sent == {"meta": {"there"}, "meta:1": {"beyond"}}


def test_room_is_looked_for_on_each_device(tmp_path, monkeypatch):
    plan = planned(write(tmp_path, {"a": numbered(4), "b": numbered(9)}), [], targets(a=(4,), b=(9,)))
    devices = {"a": "cpu", "b": "meta"}
    assert needed_bytes(plan, devices) == {"cpu": (1 << 20) + 16, "meta": (1 << 20) + 36}
    check_room(plan, devices)
    monkeypatch.setattr(loading, "_free_bytes", lambda device: 1000 if device.type == "meta" else 1 << 30)
    with pytest.raises(CapacityError, match=r"needs 1,048,612 bytes on meta, 1,000 are free; no weight was read"):
        check_room(plan, devices)


def test_the_whole_plan_is_placed(folder, two_gpus):
    plan = AutoModelForCausalLM.from_pretrained(folder, device_map="meta").plan
    embedding, layer, *_ = parts_of(plan).values()
    two_gpus.update({"cuda:0": embedding, "cuda:1": layer})
    placed = place(device_map_of("auto"), plan, loading.free_bytes)
    assert placed.keys() == plan.targets.keys()
    assert {placed[name] for name in placed if name.startswith("model.layers.0.")} == {"cuda:1"}
    assert {placed[name] for name in placed if name.startswith("model.layers.1.")} == {"cpu"}


# --- running ---


@pytest.fixture
def stand_in(monkeypatch):
    """The name of a backend whose operations fake tensors can follow."""

    def experts(module, states, top_k_index, top_k_weights):
        return states * top_k_weights.sum(-1, keepdim=True) * module.down_proj.sum() + top_k_index.sum()

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._functions, "stand-in", experts)
    return "stand-in"


@contextmanager
def apart(decoder):
    """The decoder's parts on fake devices of their own; mixing tensors of two is an error.  Gives input_ids."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder.model.embed_tokens.to("cpu:1")
        for number, layer in enumerate(decoder.model.layers):
            layer.to(f"cpu:{2 + number}")
        decoder.model.norm.to("cpu:8")
        decoder.lm_head.to("cpu:9")
        yield torch.zeros(2, 12, dtype=torch.int64, device="cpu:1")


def devices_of(*tensors):
    return {str(tensor.device) for tensor in tensors}


@torch.no_grad()  # with gradients, short attention on a CPU makes tensors on the CPU that is real
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe"])
def test_states_follow_the_layers_and_outputs_come_home(family, stand_in):
    decoder = tiny_decoder(family)
    decoder.set_experts_implementation(stand_in)
    with apart(decoder) as input_ids:
        output = decoder(input_ids, labels=input_ids, output_router_logits=True)
    assert output.logits.shape == (2, 12, 128)
    assert devices_of(output.logits, output.loss, output.aux_loss, *output.router_logits) == {"cpu:1"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_cache_of_each_layer_is_where_the_layer_is(family, stand_in):
    decoder = tiny_decoder(family)
    decoder.set_experts_implementation(stand_in)
    with apart(decoder) as input_ids:
        devices = decoder.model.layer_devices
        cache = KeyValueCache.for_decoder(decoder.config, batch=2, capacity=20, dtype=torch.float32, device=devices)
        for tokens in (12, 5, 1):  # the second with a mask, which the layers share
            logits = decoder(input_ids[:, :tokens], cache=cache).logits
        cache = cache.grown(40)
    assert len(set(devices)) == len(devices)
    assert [layer.keys.device for layer in cache.layers] == list(devices)
    assert [layer.values.device for layer in cache.layers] == list(devices)
    assert devices_of(logits) == {"cpu:1"}
    assert cache.length == 18


def test_on_one_device_layers_get_the_very_tensors(monkeypatch):
    decoder, made, given_to_layers = tiny_decoder("gpt_oss"), [], []
    masks = decoder_module.causal_masks
    monkeypatch.setattr(decoder_module, "causal_masks", lambda *asked: made.append(masks(*asked)) or made[-1])
    for layer in decoder.model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: given_to_layers.append(inputs[2]))
    decoder(ids(tokens=20))
    windowed, full = given_to_layers
    assert windowed is made[0][8]
    assert windowed is not None
    assert full is None
