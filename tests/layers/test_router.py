"""The router chooses the likeliest experts; the balancing loss is the Switch Transformer's."""

import pytest
import torch

from moebius.config import SoftmaxTopK, SparseMoe
from moebius.layers.router import Router, load_balancing_loss


def router(**routing: bool) -> Router:
    made = Router(SparseMoe(6, 2, 8, SoftmaxTopK(**routing)), 16)
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_the_chosen_are_the_likeliest_with_their_probabilities():
    choice = router(renormalize=False)(torch.randn(5, 16))
    probabilities = choice.router_logits.softmax(-1)
    assert choice.top_k_index.dtype == torch.int64
    torch.testing.assert_close(probabilities.gather(1, choice.top_k_index), choice.top_k_weights)
    assert (choice.top_k_weights.min(-1).values >= probabilities.sort().values[:, -2]).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_sum_to_one_only_if_renormalised(renormalize):
    sums = router(renormalize=renormalize)(torch.randn(5, 16)).top_k_weights.sum(-1)
    assert torch.allclose(sums, torch.ones(5)) == renormalize


@pytest.mark.parametrize(("float32_weights", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_weights_stay_float32_only_if_asked(float32_weights, dtype):
    made = router(renormalize=True, float32_weights=float32_weights).bfloat16()
    assert made(torch.randn(5, 16).bfloat16()).top_k_weights.dtype == dtype


def test_perfect_balance_gives_k_and_collapse_gives_more():
    balanced = torch.eye(4).repeat(3, 1) * 50
    assert load_balancing_loss([balanced], top_k=1) == pytest.approx(1.0)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(12, 1)
    assert load_balancing_loss([collapsed], top_k=1) == pytest.approx(4.0)


def test_layers_are_pooled_before_the_product():
    one, two = (torch.eye(4)[[e]].repeat(12, 1) * 50 for e in (0, 1))
    assert load_balancing_loss([one, two], top_k=1) == pytest.approx(2.0)


def test_padding_is_left_out():
    logits = torch.randn(2, 6, 4)
    mask = torch.ones(2, 6)
    mask[0, :4] = 0
    real = [logits[mask.bool()]]
    found = load_balancing_loss([logits.flatten(0, 1)], 2, mask)
    torch.testing.assert_close(found, load_balancing_loss(real, 2))
