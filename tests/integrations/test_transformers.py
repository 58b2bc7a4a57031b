"""transformers models run with our experts as they run with their own: logits and every gradient.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moebius.config import ClampedSwiGLU, SwiGLU
from moebius.errors import BackendError
from moebius.experts import cpu_operators, interface
from moebius.experts.cpu import CpuExperts
from moebius.integrations import expert_layers
from moebius.integrations.expert_layers import ComposedExperts, MappedExperts
from moebius.integrations.expert_variants import variant_of
from moebius.integrations.transformers import TransformersBackend, register

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "swiglu_limit": 0.2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "deepseek_v3": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
# Class: (module, what its config says, the activation that it must be seen as, or None where its steps are its own).
CLASSES = {
    "AriaExperts": ("aria", {"moe_num_experts": 4, "hidden_size": 12, "intermediate_size": 10}, SwiGLU()),
    "OpenAIPrivacyFilterExperts": (
        "openai_privacy_filter",
        {"num_local_experts": 4, "hidden_size": 12, "intermediate_size": 10, "swiglu_alpha": 1.7, "swiglu_limit": 0.5},
        ClampedSwiGLU(1.7, 0.5),
    ),
    "MiniMaxM3VLExperts": (
        "minimax_m3_vl",
        {"num_local_experts": 4, "hidden_size": 12, "intermediate_size": 10, "swiglu_alpha": 1.7, "swiglu_limit": 0.5},
        ClampedSwiGLU(1.7, 0.5),
    ),
    "DeepseekV4Experts": (
        "deepseek_v4",
        {
            "num_local_experts": 4,
            "hidden_size": 12,
            "intermediate_size": 10,
            "hidden_act": "silu",
            "swiglu_limit": 0.5,
        },
        None,
    ),
    "BeamExperts": (
        "beam",
        {"num_experts": 4, "hidden_size": 12, "moe_intermediate_size": 10, "hidden_act": "silu"},
        SwiGLU(),
    ),
    "NemotronHExperts": (
        "nemotron_h",
        {
            "n_routed_experts": 4,
            "hidden_size": 12,
            "moe_intermediate_size": 10,
            "moe_latent_size": None,
            "mlp_hidden_act": "relu2",
        },
        None,
    ),
    "MuseSparkExperts": (
        "muse_spark",
        {
            "num_local_experts": 4,
            "moe_hidden_size": 12,
            "moe_intermediate_size": 10,
            "hidden_act": "silu",
            "post_norm_eps": 1e-6,
        },
        None,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Leaves transformers' registries as they were."""
    before = [dict(each._global_mapping) for each in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)]
    names = register()
    yield names
    for each, mapping in zip((ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS), before, strict=True):
        each._global_mapping.clear()
        each._global_mapping.update(mapping)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def tiny_model(name: str):
    config = CONFIG_MAPPING[name](**{**SMALL, **MODELS[name]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def logits_and_gradients(model, implementation: str) -> dict[str, torch.Tensor]:
    model.set_experts_implementation(implementation)
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    output = model(input_ids=ids, labels=ids)
    model.zero_grad()
    output.loss.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_logits_and_gradients_of_transformers_eager(name):
    model = tiny_model(name)
    expected = logits_and_gradients(model, "eager")
    assert any("experts" in each for each in expected)
    assert_same(logits_and_gradients(model, "moebius"), expected)


@pytest.mark.parametrize("backend", ["moebius_grouped_mm", "moebius_batched_mm", "moebius_eager"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_each_backend_runs_under_its_name(name, backend):
    model = tiny_model(name)
    assert_same(logits_and_gradients(model, backend), logits_and_gradients(model, "eager"))


def test_a_name_can_be_given_when_a_model_is_made(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moebius")
    assert model.config._experts_implementation == "moebius"
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def make_layer(name: str, implementation: str = "eager") -> torch.nn.Module:
    folder, fields, _ = CLASSES[name]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = SimpleNamespace(**fields, _experts_implementation=implementation)
    return filled(getattr(module, name)(config))


def layer_inputs(tokens: int = 9):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(tokens, 12, generator=generator)
    weights, index = torch.rand(tokens, 4, generator=generator).topk(2)
    return states, index, weights


def output_and_gradients(layer, implementation: str) -> dict[str, torch.Tensor]:
    layer.config._experts_implementation = implementation
    states, index, weights = layer_inputs()
    leaves = {"states": states.requires_grad_(), "weights": weights.requires_grad_(), **dict(layer.named_parameters())}
    output = layer(states, index, weights)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("name", CLASSES)
def test_every_variant_gives_what_its_own_forward_gives(name):
    layer = make_layer(name)
    assert_same(output_and_gradients(layer, "moebius"), output_and_gradients(layer, "eager"))


@pytest.mark.parametrize("name", CLASSES)
def test_a_gate_is_told_by_its_numbers(name):
    variant = variant_of(make_layer(name))
    assert (None if variant.obstacles else variant.activation) == CLASSES[name][2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DeepseekV4Experts", "_apply_gate"), ("NemotronHExperts", "has_gate"), ("MuseSparkExperts", "post_expert_norm")],
)
def test_a_named_backend_refuses_a_variant_by_name(name, reason):
    layer = make_layer(name, "moebius_batched_mm")
    with pytest.raises(BackendError, match=reason) as refused:
        layer(*layer_inputs())
    assert name in str(refused.value)


def test_gelu_experts_are_not_taken_for_swiglu():
    layer = make_layer("BeamExperts")
    layer.act_fn = torch.nn.GELU()
    assert variant_of(layer).activation is None
    assert_same(output_and_gradients(layer, "moebius"), output_and_gradients(layer, "eager"))


@pytest.mark.parametrize("name", ["BeamExperts", "AriaExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts"])
def test_an_id_beyond_the_experts_adds_nothing(name):
    layer = make_layer(name, "moebius")
    states, index, weights = layer_inputs()
    index[3:5], weights[3:5] = 4, torch.nan
    with torch.no_grad():
        found = layer(states, index, weights)
        kept = [0, 1, 2, 5, 6, 7, 8]
        torch.testing.assert_close(found[kept], layer(states[kept], index[kept], weights[kept]))
    assert found[3:5].eq(0).all()


def test_weights_are_views_of_the_models_own():
    layer = make_layer("AriaExperts")
    mapped = MappedExperts(layer, variant_of(layer), "auto")
    assert mapped.gate_up_proj.data_ptr() == layer.gate_up_proj.data_ptr()
    assert mapped.gate_up_proj.shape == (4, 20, 12)
    assert not list(mapped.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["AriaExperts", "MiniMaxM3VLExperts"])
def test_the_cpu_backend_packs_a_layer_once_and_lets_it_go(monkeypatch, name):
    kept, packed, pack = CpuExperts(), [], cpu_operators.pack_linear
    monkeypatch.setattr(interface, "ALL_EXPERTS_FUNCTIONS", interface.ExpertsInterface({"cpu": kept}))
    monkeypatch.setattr(expert_layers, "ALL_EXPERTS_FUNCTIONS", interface.ALL_EXPERTS_FUNCTIONS)
    monkeypatch.setattr(cpu_operators, "pack_linear", lambda weight: packed.append(weight.shape) or pack(weight))
    backend, layer = TransformersBackend("cpu"), make_layer(name)
    for _ in range(2):
        torch.testing.assert_close(backend(layer, *layer_inputs()), layer(*layer_inputs()))
    assert [tuple(shape) for shape in packed].count((20, 12)) == 4
    del layer
    gc.collect()
    assert len(kept) == 0


def test_layers_are_not_kept_alive():
    backend = TransformersBackend("auto")
    layer = make_layer("BeamExperts")
    backend(layer, *layer_inputs())
    del layer
    gc.collect()
    assert not backend._layers


def test_bfloat16_layers_take_float32_routing_weights():
    layer = make_layer("NemotronHExperts", "moebius").bfloat16()
    states, index, weights = layer_inputs()
    exact = make_layer("NemotronHExperts")(states, index, weights)
    found = layer(states.bfloat16(), index, weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


def fp8_layer(**changes):
    fields = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4, "hidden_act": "silu"}
    config = SimpleNamespace(**fields, _experts_implementation="moebius")
    made = type("Fp8Experts", (FP8Experts,), {})  # the decorator changes the class that it is given
    decorated = use_experts_implementation(made, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    layer = decorated(config, **{"block_size": (16, 16), **changes})
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        scale = parameter.dtype == torch.float32
        numbers = torch.rand(parameter.shape, generator=generator) if scale else torch.randn(parameter.shape)
        parameter.data = numbers.to(parameter.dtype)
    return layer


def decoded(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    wide = scales.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return values.float() * wide


def test_fp8_experts_are_multiplied_as_if_decoded():
    layer = fp8_layer()
    states, index, weights = torch.randn(9, 64), *layer_inputs()[1:]
    gate_up = decoded(layer.gate_up_proj, layer.gate_up_proj_scale_inv)
    down = decoded(layer.down_proj, layer.down_proj_scale_inv)
    expected = torch.zeros(9, 64)
    for token, (ids, scores) in enumerate(zip(index.tolist(), weights, strict=True)):
        for e, score in zip(ids, scores, strict=True):
            gate, up = (gate_up[e] @ states[token]).chunk(2)
            expected[token] += score * (down[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(layer(states, index, weights), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_scheme": "static"}, "static"),
        ({"block_size": None}, "block_size"),
        ({"expert_dtype": "fp4"}, "expert_dtype"),
    ],
)
def test_other_quantized_experts_are_refused_by_name(changes, reason):
    with pytest.raises(BackendError, match=reason):
        fp8_layer(**changes)(torch.randn(3, 64), *(each[:3] for each in layer_inputs()[1:]))


def test_registering_again_changes_nothing_but_adds_new_names(registered):
    assert register() == registered
    assert {"moebius", "moebius_grouped_mm"} <= ALL_EXPERTS_FUNCTIONS.keys() & ALL_FP8_EXPERTS_FUNCTIONS.keys()


def test_gpt_oss_runs_in_its_own_steps_for_its_rows_are_interleaved():
    layer = next(each for each in tiny_model("gpt_oss").modules() if type(each).__name__ == "GptOssExperts")
    assert variant_of(layer).obstacles == ["gate and up rows interleaved (is_concatenated=False)"]
    assert isinstance(ComposedExperts(layer, variant_of(layer), []), ComposedExperts)
