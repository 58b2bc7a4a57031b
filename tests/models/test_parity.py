"""Each family gives what its transformers class gives: logits, losses, gradients, routing, for every backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.config import DecoderConfig, LatentAttention, RmsNorm
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from tests.families import AUX_LOSS_FAMILIES, MOE_FAMILIES, TINY, YARN, make_oracle, tiny_config
from tests.oracle_tensors import oracle_and_decoder, under_our_names

BACKENDS = ("eager", "batched_mm", "grouped_mm")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in TINY),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False}),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}}),
    ("qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False}),
    ("olmoe", {"attention_bias": True, "norm_topk_prob": True}),
    ("mixtral", {"head_dim": 24}),
    ("gpt_oss", {"swiglu_alpha": 1.3, "swiglu_limit": 1.0, "layer_types": ["full_attention", "sliding_attention"]}),
    ("gpt_oss", {"attention_bias": False, "rope_scaling": {"rope_type": "default"}}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
    ("deepseek_v2", {"attention_bias": True, "first_k_dense_replace": 0, "rope_scaling": None}),
    ("deepseek_v3", {"q_lora_rank": None, "norm_topk_prob": False, "rope_scaling": None}),
    ("deepseek_v3", {"attention_bias": True, "n_shared_experts": 2, "rope_scaling": {**YARN, "mscale": 0.5}}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "n_group": 4, "topk_group": 2}),
    ("minimax_m2", {"rotary_dim": None}),
]
NAMES = ["-".join([family, *changes]) for family, changes in VARIANTS]

LOGITS, LOSS, GRADIENT = 5e-5, 5e-6, 5e-5  # of gradients, either side is off by up to 2e-5 from float64


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [3, 24], a mask that pads two rows on the left, labels without padding and what padding would predict."""
    input_ids = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :5], mask[2, :11] = 0, 0
    predicted = mask.roll(1, dims=1)
    return input_ids, mask, input_ids.masked_fill((mask & predicted) == 0, -100)


def furthest(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_logits_loss_and_every_gradient(family, changes, backend):
    oracle, decoder = oracle_and_decoder(family, changes, backend)
    input_ids, _, _ = batch()
    expected, found = oracle(input_ids, labels=input_ids), decoder(input_ids, labels=input_ids)
    assert expected.logits.abs().max() > 3  # large enough for a fault to show
    assert furthest(found.logits, expected.logits) < LOGITS
    assert furthest(found.loss, expected.loss) < LOSS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_left_padded_batches(family, changes):
    oracle, decoder = oracle_and_decoder(family, changes)
    input_ids, mask, labels = batch()
    expected = oracle(input_ids, attention_mask=mask, labels=labels)
    found = decoder(input_ids, mask, labels)
    assert furthest(found.logits[mask.bool()], expected.logits[mask.bool()]) < LOGITS
    assert furthest(found.loss, expected.loss) < LOSS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", AUX_LOSS_FAMILIES)
def test_the_auxiliary_loss_and_its_gradients(family, backend):
    """Without padding: what stands in a padded position is anyone's choice, and only the mask keeps it out."""
    oracle, decoder = oracle_and_decoder(family, {}, backend)
    input_ids, _, _ = batch()
    expected = oracle(input_ids, labels=input_ids, output_router_logits=True)
    found = decoder(input_ids, labels=input_ids, output_router_logits=True)
    assert furthest(found.aux_loss, expected.aux_loss) < LOSS
    assert furthest(found.loss, expected.loss) < LOSS
    assert found.loss != decoder(input_ids, labels=input_ids).loss
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert furthest(ours, theirs) < LOGITS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize("family", AUX_LOSS_FAMILIES)
def test_the_auxiliary_loss_leaves_padding_out(family):
    oracle, decoder = oracle_and_decoder(family, {"output_router_logits": True})
    input_ids, mask, labels = batch()
    expected = oracle(input_ids, attention_mask=mask, labels=labels)
    found = decoder(input_ids, mask, labels)
    assert furthest(found.aux_loss, expected.aux_loss) < LOSS
    assert furthest(found.loss, expected.loss) < LOSS


def test_position_ids_are_followed():
    oracle, decoder = oracle_and_decoder("qwen3_moe", {})
    input_ids, _, _ = batch()
    positions = torch.arange(24).flip(0).expand(3, 24) + 9
    found = decoder(input_ids, position_ids=positions).logits
    assert furthest(found, oracle(input_ids, position_ids=positions).logits) < LOGITS
    assert furthest(found, decoder(input_ids).logits) > 0.1


def assert_same_gradients(oracle: Any, decoder: Decoder, expected: Tensor, found: Tensor) -> None:
    """Each parameter's gradient of 100 times the loss, so that gradients are of size 1 and the bound bites."""
    parameters = dict(oracle.named_parameters())
    gradients = torch.autograd.grad(100 * expected, list(parameters.values()))
    buffers = {name: torch.zeros_like(oracle.get_buffer(name)) for name in correction_biases(oracle)}
    theirs = under_our_names(dict(zip(parameters, gradients, strict=True)) | buffers, decoder)
    ours = dict(decoder.named_parameters())
    for name, gradient in zip(ours, torch.autograd.grad(100 * found, list(ours.values())), strict=True):
        bound = GRADIENT * max(1.0, theirs[name].abs().max().item())
        assert furthest(gradient, theirs[name]) < bound, name


def correction_biases(oracle: Any) -> list[str]:
    return [name for name, _ in oracle.named_buffers() if name.endswith("correction_bias")]


@pytest.mark.parametrize("family", sorted(set(MOE_FAMILIES) - set(AUX_LOSS_FAMILIES)))
def test_a_router_that_transformers_gives_no_loss_has_none_here(family):
    oracle, decoder = oracle_and_decoder(family, {})
    input_ids, _, _ = batch()
    assert oracle(input_ids, labels=input_ids, output_router_logits=True).aux_loss is None
    assert (
        decoder(input_ids, labels=input_ids, output_router_logits=True).loss
        == decoder(input_ids, labels=input_ids).loss
    )


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_routing_in_bfloat16_keeps_the_dtypes_and_the_values(family):
    oracle, decoder = oracle_and_decoder(family, {})
    ours: Any = decoder.model.layers[-1]
    states = torch.randn(24, 64).bfloat16()
    _, weights, index = routed_by_transformers(family, oracle.model.layers[-1].mlp, states)
    found = ours.mlp.gate.bfloat16()(states)
    expected_index, order = index.sort(dim=-1)
    found_index, found_order = found.top_k_index.sort(dim=-1)
    assert torch.equal(found_index, expected_index)
    assert found.top_k_weights.dtype == weights.dtype
    # in bfloat16 this is equality; in float32 the order of a sum over K may differ
    expected = weights.gather(-1, order)
    torch.testing.assert_close(found.top_k_weights.gather(-1, found_order), expected, rtol=1e-6, atol=0)


def routed_by_transformers(family: str, mlp: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With what each family keeps in float32: correction biases, and MiniMax-M2's gate."""
    match family:
        case "minimax_m2":
            return mlp.gate(states, mlp.e_score_correction_bias)
        case "gpt_oss":
            return mlp.router.bfloat16()(states)
        case _:
            kept = {name: buffer.clone() for name, buffer in mlp.gate.named_buffers()}
            gate = mlp.gate.bfloat16()
            for name, buffer in kept.items():
                setattr(gate, name, buffer)
            return gate(states)


# --- what would show --------------------------------------------------------------------------------------------------

LEFT_OUT: list[tuple[str, dict[str, Any]]] = [
    ("gpt_oss", {"sliding_window": 7}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gpt_oss", {"swiglu_limit": 1e6}),
    ("gpt_oss", {"swiglu_alpha": 1.6}),
    ("gpt_oss", {"rope_scaling": {**TINY["gpt_oss"]["rope_scaling"], "truncate": True}}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"topk_group": 3}),
    ("deepseek_v2", {"routed_scaling_factor": 1.0}),
    ("deepseek_v2", {"rope_scaling": YARN}),
    ("deepseek_v3", {"topk_group": 3}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}}),
    ("deepseek_v3", {"rope_scaling": {**YARN, "beta_slow": 2}}),
    ("kimi_k2", {"rope_scaling": {**TINY["kimi_k2"]["rope_scaling"], "beta_fast": 32.0}}),
    ("glm4_moe", {"partial_rotary_factor": 1.0}),
    ("glm4_moe", {"routed_scaling_factor": 1.0}),
    ("minimax_m2", {"rotary_dim": 32}),
]


@pytest.mark.parametrize(("family", "changes"), LEFT_OUT, ids=str)
def test_a_field_read_wrongly_would_show(family, changes):
    oracle, decoder = oracle_and_decoder(family, {})
    raw = tiny_config(family, **changes)
    other = Decoder(family_of(raw).from_hf(raw)).eval()
    other.load_state_dict(decoder.state_dict())
    input_ids, _, _ = batch()
    assert furthest(other(input_ids).logits, oracle(input_ids).logits) > 100 * LOGITS


@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("gpt_oss", "sinks"),
        ("gpt_oss", "mlp.gate.bias"),
        ("gpt_oss", "gate_up_proj_bias"),
        ("gpt_oss", "down_proj_bias"),
        ("gpt_oss", "o_proj.bias"),
        ("deepseek_v3", "e_score_correction_bias"),
        ("kimi_k2", "e_score_correction_bias"),
        ("glm4_moe", "e_score_correction_bias"),
        ("glm4_moe", "q_proj.bias"),
        ("minimax_m2", "e_score_correction_bias"),
    ],
)
def test_a_tensor_left_out_would_show(family, ending):
    oracle, decoder = oracle_and_decoder(family, {})
    named = [tensor for name, tensor in decoder.state_dict().items() if name.endswith(ending)]
    assert named
    for tensor in named:
        tensor.zero_()
    input_ids, _, _ = batch()
    assert furthest(decoder(input_ids).logits, oracle(input_ids).logits) > 100 * LOGITS


def test_latents_are_normalised_with_an_epsilon_of_their_own():
    """1e-6 whatever rms_norm_eps says; small latents show it."""
    raw = tiny_config("kimi_k2")
    oracle = make_oracle("kimi_k2")
    for name, parameter in oracle.named_parameters():
        if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")):
            parameter.data.mul_(0.01)
    config = family_of(raw).from_hf(raw)
    assert config.norm == RmsNorm(1e-5)
    input_ids, _, _ = batch()
    expected = oracle(input_ids).logits
    assert furthest(with_tensors(config, oracle)(input_ids).logits, expected) < LOGITS
    wrong = with_latent_norm(config, config.norm)
    assert furthest(with_tensors(wrong, oracle)(input_ids).logits, expected) > 100 * LOGITS


def with_latent_norm(config: DecoderConfig, norm: RmsNorm) -> DecoderConfig:
    mixer = config.layers[0].mixer
    assert isinstance(mixer, LatentAttention)
    changed = replace(mixer, norm=norm)
    return replace(config, layers=tuple(replace(layer, mixer=changed) for layer in config.layers))


def with_tensors(config: DecoderConfig, oracle: Any) -> Decoder:
    decoder = Decoder(config)
    decoder.load_state_dict(under_our_names(oracle.state_dict(), decoder))
    return decoder.eval()
