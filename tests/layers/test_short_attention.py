"""Short sequences in training take plain products on a CPU: the same numbers as torch's fused attention."""

import pytest
import torch
import torch.nn.functional as F

from moebius.layers import attention


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 33, attention.SHORT])
def test_plain_products_equal_fused_attention(heads, groups, tokens):
    shapes = [(2, tokens, heads, 8), (2, tokens, groups, 8), (2, tokens, groups, 8)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = [leaf.transpose(1, 2) for leaf in leaves]  # as the projections leave them: strided
    found = attention._attend_short(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_they_are_for_training_and_short_sequences_alone(monkeypatch):
    monkeypatch.setattr(attention, "_attend_short", lambda *_: "short")
    query, key = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 2, 8, 8)
    assert attention._attend(query, key, key, None) == "short"
    assert attention._attend(query.detach(), key, key, None) != "short"
    assert attention._attend(query, key, key, torch.zeros(1, 1, 8, 8)) != "short"
    longer = torch.randn(1, 4, attention.SHORT + 1, 8, requires_grad=True)
    assert attention._attend(longer, longer, longer, None) != "short"
