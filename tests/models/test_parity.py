"""Each family gives what its transformers class gives: logits, losses, gradients, for every backend."""

from typing import Any

import pytest
import torch

from moebius.layers.decoder import Decoder
from moebius.models import family_of
from tests.families import MOE_FAMILIES, TINY, make_oracle, tiny_config

BACKENDS = ("eager", "batched_mm", "grouped_mm")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in TINY),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False}),
    ("qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False}),
    ("olmoe", {"attention_bias": True, "norm_topk_prob": True}),
    ("mixtral", {"head_dim": 24}),
]
NAMES = ["-".join([family, *changes]) for family, changes in VARIANTS]

LOGITS, LOSS, GRADIENT = 5e-5, 5e-6, 1e-5


def pair(family: str, changes: dict[str, Any], backend: str = "auto") -> tuple[Any, Decoder]:
    """The oracle, and a decoder with its very parameters."""
    raw = tiny_config(family, **changes)
    oracle = make_oracle(family, **changes)
    decoder = Decoder(family_of(raw).from_hf(raw), experts_implementation=backend)
    decoder.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, decoder.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [3, 24], a mask that pads two rows on the left, labels without padding and what padding would predict."""
    input_ids = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :5], mask[2, :11] = 0, 0
    predicted = mask.roll(1, dims=1)
    return input_ids, mask, input_ids.masked_fill((mask & predicted) == 0, -100)


def furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_logits_loss_and_every_gradient(family, changes, backend):
    oracle, decoder = pair(family, changes, backend)
    input_ids, _, _ = batch()
    expected, found = oracle(input_ids, labels=input_ids), decoder(input_ids, labels=input_ids)
    assert expected.logits.abs().max() > 3  # large enough for a fault to show
    assert furthest(found.logits, expected.logits) < LOGITS
    assert furthest(found.loss, expected.loss) < LOSS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=NAMES)
def test_left_padded_batches(family, changes):
    oracle, decoder = pair(family, changes)
    input_ids, mask, labels = batch()
    expected = oracle(input_ids, attention_mask=mask, labels=labels)
    found = decoder(input_ids, mask, labels)
    assert furthest(found.logits[mask.bool()], expected.logits[mask.bool()]) < LOGITS
    assert furthest(found.loss, expected.loss) < LOSS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_auxiliary_loss_and_its_gradients(family, backend):
    """Without padding: what stands in a padded position is anyone's choice, and only the mask keeps it out."""
    oracle, decoder = pair(family, {}, backend)
    input_ids, _, _ = batch()
    expected = oracle(input_ids, labels=input_ids, output_router_logits=True)
    found = decoder(input_ids, labels=input_ids, output_router_logits=True)
    assert furthest(found.aux_loss, expected.aux_loss) < LOSS
    assert furthest(found.loss, expected.loss) < LOSS
    assert found.loss != decoder(input_ids, labels=input_ids).loss
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert furthest(ours, theirs) < LOGITS
    assert_same_gradients(oracle, decoder, expected.loss, found.loss)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_auxiliary_loss_leaves_padding_out(family):
    oracle, decoder = pair(family, {"output_router_logits": True})
    input_ids, mask, labels = batch()
    expected = oracle(input_ids, attention_mask=mask, labels=labels)
    found = decoder(input_ids, mask, labels)
    assert furthest(found.aux_loss, expected.aux_loss) < LOSS
    assert furthest(found.loss, expected.loss) < LOSS


def test_position_ids_are_followed():
    oracle, decoder = pair("qwen3_moe", {})
    input_ids, _, _ = batch()
    positions = torch.arange(24).flip(0).expand(3, 24) + 9
    found = decoder(input_ids, position_ids=positions).logits
    assert furthest(found, oracle(input_ids, position_ids=positions).logits) < LOGITS
    assert furthest(found, decoder(input_ids).logits) > 0.1


def assert_same_gradients(oracle: Any, decoder: Decoder, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Each parameter's gradient of 100 times the loss, so that gradients are of size 1 and the bound bites."""
    names = [name for name, _ in oracle.named_parameters()]
    ours = dict(decoder.named_parameters())
    assert set(names) == set(ours)
    theirs = torch.autograd.grad(100 * expected, [oracle.get_parameter(name) for name in names])
    for name, ours_grad, theirs_grad in zip(
        names, torch.autograd.grad(100 * found, [ours[name] for name in names]), theirs, strict=True
    ):
        bound = GRADIENT * max(1.0, theirs_grad.abs().max().item())
        assert furthest(ours_grad, theirs_grad) < bound, name


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_routing_in_bfloat16_keeps_the_dtype_and_the_values(family):
    oracle, decoder = pair(family, {})
    theirs, ours = (model.model.layers[0].mlp.gate.bfloat16() for model in (oracle, decoder))
    states = torch.randn(24, 64).bfloat16()
    (_, weights, index), found = theirs(states), ours(states)
    assert found.top_k_weights.dtype == weights.dtype
    assert torch.equal(found.top_k_weights, weights)
    assert torch.equal(found.top_k_index, index)
