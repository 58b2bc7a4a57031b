"""Held-out text: every token is predicted once, each from what stands before it."""

import math

import pytest
import torch
import torch.nn.functional as F

from moebius.training.evaluation import bits_per_byte, nats


@torch.no_grad()
def one_by_one(decoder, tokens, seq_len):
    """Each token by itself, from the window that `nats` says it is predicted from."""
    total = 0.0
    for place in range(1, len(tokens)):
        stride = seq_len // 2
        start = 0 if place < seq_len else (place - seq_len) // stride * stride + stride
        logits = decoder(tokens[None, start:place]).logits[0, -1]
        total += float(F.cross_entropy(logits, tokens[place]))
    return total


@pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 31])
def test_every_token_but_the_first_is_predicted_once(decoder, length):
    tokens = torch.randint(64, (length,), generator=torch.Generator().manual_seed(1))
    assert nats(decoder, tokens, seq_len=8) == pytest.approx(one_by_one(decoder, tokens, 8), rel=1e-5)


def test_bits_per_byte_of_a_decoder_that_knows_nothing(decoder):
    decoder.lm_head.weight.data.zero_()
    tokens = torch.arange(33)
    assert bits_per_byte(decoder, tokens, nbytes=64, seq_len=8) == pytest.approx(32 * math.log2(64) / 64)
