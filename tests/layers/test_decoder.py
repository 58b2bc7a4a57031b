"""The decoder as a whole: names, roles, initialisation, caches, padding, refusals."""

import pytest
import torch

from moebius.config import (
    DecoderConfig,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    RmsNorm,
    Rope,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMoe,
    TopKSoftmax,
)
from moebius.errors import ArgumentError, BackendError
from moebius.layers.decoder import Decoder
from moebius.models import family_of
from tests.families import TINY, randomize, tiny_config
from tests.layers.test_attention import ListCache

PLACES = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("self_attn", "attention"),
    ("gate.weight", "router"),
    ("mlp.experts", "routed_experts"),
    ("shared_expert", "shared_experts"),
    ("layers.0.mlp", "dense_mlp"),
    ("norm", "norm"),
)


def tiny_decoder(family: str = "qwen3_moe", **changes) -> Decoder:
    raw = tiny_config(family, **changes)
    decoder = Decoder(family_of(raw).from_hf(raw))
    randomize(decoder, seed=0)
    return decoder.eval()


class ListDecoderCache:
    """The plainest Cache."""

    def __init__(self, layers: int) -> None:
        self.layers = [ListCache() for _ in range(layers)]
        self.length = 0

    def advance(self, tokens: int) -> None:
        self.length += tokens


def ids(batch: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunks", [(12,), (7, 5), (7, 1, 1, 3)])
def test_a_prompt_in_chunks_through_a_cache_equals_the_whole(chunks):
    decoder, input_ids, cache = tiny_decoder(), ids(), ListDecoderCache(2)
    whole = decoder(input_ids).logits
    parts = [decoder(part, cache=cache).logits for part in input_ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=5e-5)
    assert cache.length == 12


def test_left_padding_changes_no_real_position_and_gives_no_nan():
    decoder, input_ids = tiny_decoder(), ids(1)
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), input_ids], 1), torch.ones(1, 17)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0).long()
    logits = decoder(padded, mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 5:], decoder(input_ids).logits, rtol=0, atol=5e-5)
    assert logits.isfinite().all()


def test_a_row_of_nothing_but_padding_gives_finite_logits_and_gradients():
    decoder = tiny_decoder()
    decoder(ids(), torch.tensor([[0] * 12, [1] * 12]), ids()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("family", TINY)
def test_it_builds_on_meta_with_the_names_it_has_anywhere(family):
    raw = tiny_config(family)
    with torch.device("meta"):
        meta = Decoder(family_of(raw).from_hf(raw))
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert list(meta.state_dict()) == list(tiny_decoder(family).state_dict())
    assert meta.parameter_roles() == tiny_decoder(family).parameter_roles()


def test_every_parameter_has_the_role_of_its_place():
    roles = tiny_decoder("qwen2_moe", mlp_only_layers=[0]).parameter_roles()
    for name, role in roles.items():
        assert role in [expected for part, expected in PLACES if part in name], name
    assert set(roles.values()) == {role for _, role in PLACES}


def test_norms_of_queries_and_keys_are_norms():
    assert tiny_decoder().parameter_roles()["model.layers.0.self_attn.q_norm.weight"] == "norm"


def test_initialisation_repeats_with_its_generator_and_fills_by_role():
    decoder, again = tiny_decoder("qwen2_moe"), tiny_decoder("qwen2_moe")
    decoder.init_weights(torch.Generator().manual_seed(4))
    again.init_weights(torch.Generator().manual_seed(4))
    state = decoder.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert state["model.norm.weight"].eq(1).all()
    assert state["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    assert state["model.layers.0.mlp.experts.gate_up_proj"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def decoder_of(mixer, **sparse) -> Decoder:
    layer = LayerConfig(mixer, SparseMoe(4, 2, 8, **sparse))
    return Decoder(DecoderConfig("test", 64, 32, 64, (layer,), RmsNorm(1e-6)))


LATENT = LatentAttention(4, 24, 16, 12, 8, 10, Rope(1e4, 8, interleaved=True), RmsNorm(1e-6), bias=True)
SINKS = GroupedQueryAttention(4, 2, 8, Rope(1e4, 8), sliding_window=4, sinks=True)


def test_latents_are_attention_and_their_norms_are_norms():
    roles = decoder_of(LATENT, routing=SoftmaxTopK(True)).parameter_roles()
    own = {name.removeprefix("model.layers.0.self_attn."): role for name, role in roles.items() if "self_attn" in name}
    norms = {"q_a_layernorm.weight", "kv_a_layernorm.weight"}
    assert {name for name, role in own.items() if role == "norm"} == norms
    projections = {name for name, role in own.items() if role == "attention"}
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    plain = {f"{name}.weight" for name in (*biased, "q_b_proj", "kv_b_proj")}
    assert projections == plain | {f"{name}.bias" for name in biased}


def test_sinks_are_attention_and_start_small():
    decoder = decoder_of(SINKS, routing=TopKSoftmax(), bias=True)
    assert decoder.parameter_roles()["model.layers.0.self_attn.sinks"] == "attention"
    with torch.no_grad():
        decoder.model.layers[0].self_attn.sinks.fill_(float("nan"))
    decoder.init_weights()
    assert 0 < decoder.state_dict()["model.layers.0.self_attn.sinks"].abs().max() < 0.2
    biases = [value for name, value in decoder.state_dict().items() if name.endswith("bias")]
    assert len(biases) == 3
    assert not any(bias.any() for bias in biases)


def test_buffers_are_initialised_too():
    with torch.device("meta"):
        decoder = decoder_of(LATENT, routing=SigmoidTopK(True))
    decoder.to_empty(device="cpu")
    correction = dict(decoder.named_buffers())["model.layers.0.mlp.gate.e_score_correction_bias"]
    correction.fill_(float("nan"))
    decoder.init_weights()
    assert not correction.any()


@pytest.mark.parametrize("mixer", [LATENT, SINKS], ids=["latent", "sinks"])
def test_every_parameter_of_every_mixer_learns(mixer):
    decoder = decoder_of(mixer, routing=SoftmaxTopK(True))
    decoder.init_weights()
    decoder(ids(tokens=9) % 64, labels=ids(tokens=9) % 64).loss.backward()
    without = [name for name, parameter in decoder.named_parameters() if not parameter.grad.any()]
    assert without == []


def test_a_tied_head_is_the_embedding_itself_and_can_be_tied_again():
    decoder = tiny_decoder("qwen2", tie_word_embeddings=True)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert "lm_head.weight" not in decoder.parameter_roles()
    decoder.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(128, 64))
    decoder.tie_weights()
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


def test_only_the_asked_for_logits_are_computed():
    decoder = tiny_decoder()
    whole = decoder(ids()).logits
    torch.testing.assert_close(decoder(ids(), logits_to_keep=3).logits, whole[:, -3:])
    assert decoder(ids()).loss is None
    assert decoder(ids()).router_logits is None


def test_a_dense_model_asked_for_router_logits_has_none():
    output = tiny_decoder("qwen2")(ids(), labels=ids(), output_router_logits=True)
    assert output.router_logits == ()
    assert output.aux_loss is None


def test_all_layers_take_another_backend_at_run_time():
    decoder = tiny_decoder()
    before = decoder(ids()).logits
    decoder.set_experts_implementation("eager")
    names = {layer.mlp.experts.experts_implementation for layer in decoder.model.layers}
    assert names == {"eager"}
    torch.testing.assert_close(decoder(ids()).logits, before, rtol=0, atol=5e-5)
    with pytest.raises(BackendError, match="known"):
        decoder.set_experts_implementation("nothing")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_mask": torch.ones(2, 11)}, "attention_mask"),
        ({"labels": torch.zeros(1, 12, dtype=torch.long)}, "labels"),
        ({"position_ids": torch.zeros(3, 12, dtype=torch.long)}, "position_ids"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"logits_to_keep": 1, "labels": torch.zeros(2, 12, dtype=torch.long)}, "logits_to_keep"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments, named):
    with pytest.raises(ArgumentError, match=named):
        tiny_decoder()(ids(), **arguments)


def test_all_misfits_are_told_at_once():
    with pytest.raises(ArgumentError) as raised:
        tiny_decoder()(ids(), torch.ones(2, 3), torch.zeros(2, 3))
    assert [fault.where for fault in raised.value.faults] == ["attention_mask", "labels"]
