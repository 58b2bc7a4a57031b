"""How well a decoder predicts a text that it was not trained on.

N tokens in the text, W windows, T tokens a window.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.layers.decoder import IGNORED_LABEL, Decoder, causal_loss

BATCH = 16  # windows a forward


def bits_per_byte(decoder: Decoder, tokens: Tensor, nbytes: int, seq_len: int) -> float:
    """The text's negative log likelihood in bits, divided by its size: comparable over tokenizers.

    tokens: [N] int64, the first of which is not of the text (the end-of-text token).  nbytes: the text's, in UTF-8.
    """
    return nats(decoder, tokens, seq_len) / math.log(2) / nbytes


@torch.no_grad()
def nats(decoder: Decoder, tokens: Tensor, seq_len: int) -> float:
    """The summed negative log likelihood, in nats, of tokens[1:], each predicted once.

    The text is read in windows of `seq_len` that overlap by half, so that all but its first tokens are predicted from
    seq_len / 2 tokens before them at least.
    """
    windows, labels = _overlapping(tokens, seq_len)
    total = 0.0
    for rows, targets in zip(windows.split(BATCH), labels.split(BATCH), strict=True):
        predicted = int((targets[:, 1:] != IGNORED_LABEL).sum())
        total += float(causal_loss(decoder(rows).logits, targets)) * predicted
    return total


def _overlapping(tokens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Windows and labels [W, T]; a token is labelled only in the first window that predicts it."""
    stride = max(1, seq_len // 2)
    count = max(1, math.ceil((tokens.numel() - seq_len + stride) / stride))
    windows = F.pad(tokens, (0, seq_len)).unfold(0, seq_len, stride)[:count]
    labels = F.pad(tokens, (0, seq_len), value=IGNORED_LABEL).unfold(0, seq_len, stride)[:count].clone()
    labels[1:, : seq_len - stride] = IGNORED_LABEL
    return windows, labels
