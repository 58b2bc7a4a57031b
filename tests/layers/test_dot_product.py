"""Every form of attention gives softmax(q k^T scale) v, and the gradients of that.

B batch, T queries, S keys, D channels, D_v of values.
"""

import pytest
import torch
import torch.nn.functional as F

from moebius.layers import dot_product
from moebius.layers.dot_product import dot_product_attention
from moebius.layers.masks import causal_masks


def plainly(query, key, value, mask, scale, sinks=None):
    """With all scores, all heads apart, and the sink a column that is dropped after the softmax."""
    copies = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    tokens, keys = scores.shape[2:]
    hidden = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens).logical_not()
    scores = scores.masked_fill(hidden, float("-inf")) if mask is None else scores + mask
    if sinks is None:
        return scores.softmax(-1) @ value
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def leaves(heads, groups, tokens, keys, width=8, value_width=8, batch=2):
    """query, key, value as projections leave them: strided, and each a leaf's transpose."""
    shapes = (tokens, heads, width), (keys, groups, width), (keys, groups, value_width)
    made = [torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return made, [leaf.transpose(1, 2) for leaf in made]


def masked(tokens, keys, window=None, padding=0):
    """The mask of a forward of so many tokens at the end of so many keys, the first of them padding in one row."""
    real = torch.ones(2, keys)
    real[0, :padding] = 0
    return causal_masks([window], real, tokens, keys - tokens, torch.zeros(1, dtype=torch.float64))[window]


CASES = [
    pytest.param(5, 5, None, id="causal"),
    pytest.param(1, 1, None, id="one"),
    pytest.param(1, 9, None, id="decode"),
    pytest.param(1, 9, masked(1, 9, padding=3), id="decode-padded"),
    pytest.param(12, 12, masked(12, 12, padding=4), id="padded"),
    pytest.param(12, 12, masked(12, 12, window=4), id="window"),
    pytest.param(5, 12, masked(5, 12), id="chunk"),
    pytest.param(dot_product.SHORT + 2, dot_product.SHORT + 2, None, id="long"),
]


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize(("tokens", "keys", "mask"), CASES)
def test_it_is_its_formula_with_every_gradient(tokens, keys, mask, heads, groups, width, value_width, with_sinks):
    inputs, states = leaves(heads, groups, tokens, keys, width, value_width)
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True) if with_sinks else None
    inputs += [sinks] if sinks is not None else []
    found = dot_product_attention(*states, mask, scale=0.3, sinks=sinks)
    expected = plainly(*states, mask, 0.3, sinks)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(output, inputs, grad) for output in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("tokens", "keys"), [(14, 14), (17, 17), (16, 18), (17, 20)])
def test_a_window_in_blocks_equals_the_whole(monkeypatch, tokens, keys, with_sinks):
    monkeypatch.setattr(dot_product, "BLOCK", 8)
    inputs, states = leaves(4, 2, tokens, keys)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    inputs += [sinks] if sinks is not None else []
    mask = masked(tokens, keys, window=4, padding=3)
    found = dot_product_attention(*states, mask, scale=0.3, sinks=sinks, window=4)
    expected = plainly(*states, mask, 0.3, sinks)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    gradients = (torch.autograd.grad(output, inputs, grad) for output in (found, expected))
    torch.testing.assert_close(*gradients)


def test_a_window_in_blocks_reads_no_key_out_of_sight(monkeypatch):
    monkeypatch.setattr(dot_product, "BLOCK", 8)
    widths = []
    fused = dot_product._attend
    monkeypatch.setattr(dot_product, "_attend", lambda q, k, *rest: widths.append(k.shape[2]) or fused(q, k, *rest))
    _, states = leaves(4, 2, 40, 43)
    dot_product_attention(*states, masked(40, 43, window=4), scale=1.0, window=4)
    assert max(widths) <= 8 + 3 + 7  # a block, its window, and what leads to a multiple of 8
    assert len(widths) == 5


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_sink_takes_its_share_of_the_softmax(tokens):
    query, key, value = torch.zeros(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8), torch.ones(1, 2, tokens, 8)
    found = dot_product_attention(query, key, value, None, scale=1.0, sinks=torch.tensor([0.0, 2.0]))
    seen = torch.arange(1, tokens + 1).float()
    for head, sink in enumerate((0.0, 2.0)):
        torch.testing.assert_close(found[0, head, :, 0], seen / (seen + torch.tensor(sink).exp()))


@pytest.mark.parametrize("tokens", [1, 7])
def test_sinks_from_none_to_all(tokens):
    _, states = leaves(4, 2, tokens, tokens)
    none = dot_product_attention(*states, None, scale=1.0, sinks=torch.full((4,), -200.0, dtype=torch.float64))
    torch.testing.assert_close(none, dot_product_attention(*states, None, scale=1.0))
    every = dot_product_attention(*states, None, scale=1.0, sinks=torch.full((4,), 200.0, dtype=torch.float64))
    assert every.abs().max() < 1e-9


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 4).bfloat16()], ids=["", "sinks"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 20), (20, 20)])
def test_bfloat16_stays_and_is_near(tokens, keys, sinks):
    states = [torch.randn(2, heads, n, 64).bfloat16() for heads, n in ((4, tokens), (2, keys), (2, keys))]
    found = dot_product_attention(*states, None, scale=64**-0.5, sinks=sinks)
    assert found.dtype == torch.bfloat16
    expected = plainly(*(each.float() for each in states), None, 64**-0.5, None if sinks is None else sinks.float())
    assert (found.float() - expected).abs().max() < 0.02


@pytest.mark.parametrize(("value_width", "with_sinks"), [(64, True), (32, False)], ids=["sinks", "narrow-values"])
def test_long_prompts_keep_no_scores_of_all_heads(monkeypatch, value_width, with_sinks):
    """What torch's fused attention takes, it gets: one width, in eights."""
    seen = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a) or fused(*a, **k))
    states = [torch.randn(1, 2, 300, width) for width in (64, 64, value_width)]
    sinks = torch.zeros(2) if with_sinks else None
    dot_product_attention(*states, None, scale=1.0, sinks=sinks)
    (call,) = seen
    assert len({each.shape[-1] for each in call[:3]}) == 1
    assert call[0].shape[-1] % 8 == 0


def test_plain_products_are_for_training_and_short_sequences_alone(monkeypatch):
    monkeypatch.setattr(dot_product, "_attend_short", lambda *_: "short")
    query, key = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 2, 8, 8)
    assert dot_product._attend(query, key, key, None, 1.0) == "short"
    assert dot_product._attend(query.detach(), key, key, None, 1.0) != "short"
    assert dot_product._attend(query, key, key, torch.zeros(1, 1, 8, 8), 1.0) != "short"
    longer = torch.randn(1, 4, dot_product.SHORT + 1, 8, requires_grad=True)
    assert dot_product._attend(longer, longer, longer, None, 1.0) != "short"
