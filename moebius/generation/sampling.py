"""From logits to the next token: pure functions on logits [B, V] in float32. B batch, V vocabulary.

The filters keep the same tokens as transformers' processors, and run in its order: repetition penalty, minimum length,
the caller's processors; then, when sampling, temperature, top_k, top_p, min_p. A token that is not kept has logit -inf.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.generation.config import GenerationConfig

NOT_KEPT = float("-inf")
TINY = torch.finfo(torch.float32).tiny  # keeps log(noise) finite: -inf + inf would be no number


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` (bool [B, V]) less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def forbid(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Rule out these tokens, in every row."""
    return logits.index_fill(1, torch.tensor(token_ids, device=logits.device), NOT_KEPT)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the k likeliest; tokens that tie with the last of them stay too."""
    threshold = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < threshold, NOT_KEPT)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens that hold `top_p` of the probability, one at least (Holtzman et al. 2020)."""
    ascending, order = logits.sort()
    dropped = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - top_p
    dropped[:, -1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), NOT_KEPT)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, Min-p Sampling)."""
    probabilities = logits.softmax(dim=1)
    most = probabilities.amax(dim=1, keepdim=True)
    return logits.masked_fill(probabilities < min_p * most, NOT_KEPT)


def warp(logits: Tensor, config: GenerationConfig) -> Tensor:
    """The distribution to draw from: temperature, then the filters that are on."""
    if config.temperature is not None and config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return keep_min_p(logits, config.min_p) if config.min_p else logits


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """One token a row, [B], distributed as softmax(logits), given noise [B, V] of independent Exp(1) numbers.

    argmax(logits - log(noise)), the Gumbel-max trick: -log of an Exp(1) number is Gumbel (Maddison et al. 2014, A*
    Sampling, section 2).
    """
    return (logits - noise.clamp_min(TINY).log()).argmax(dim=1)


def free_noise(logits: Tensor) -> Tensor:
    """Exp(1) noise [B, V] from torch's own generator, which torch.manual_seed governs."""
    return torch.empty_like(logits).exponential_()


def seeded_noise(logits: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Exp(1) noise [B, V], row b's a function of seeds[b] and positions[b] alone: not of its place in the batch.

    positions: which token of its row is drawn, padding not counted. Drawn on the CPU, so every device gets the same.
    """
    rows = [_exponential(seed, position, logits.shape[1]) for seed, position in zip(seeds, positions, strict=True)]
    return torch.stack(rows).to(logits.device)


def _exponential(seed: int, position: int, size: int) -> Tensor:
    # Hashed: torch's CPU generator takes 32 bits of its seed, and neighbouring seeds should have nothing in common.
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(size).exponential_(generator=generator)
