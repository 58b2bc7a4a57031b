"""The filters keep what transformers' processors keep, and draws follow the distribution they leave."""

import pytest
import torch
from transformers.generation import logits_process as oracle

from moebius.generation.config import GenerationConfig
from moebius.generation.sampling import (
    draw,
    forbid,
    free_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    seeded_noise,
    warp,
)

V = 97


def cases():
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, V, generator=generator) * 3
    tied = torch.randint(0, 4, (6, V), generator=generator).float()
    one_hot = torch.full((2, V), -100.0).index_fill(1, torch.tensor([5]), 10.0)
    halves = torch.full((1, V), float("-inf")).index_fill(1, torch.tensor([4, 9]), 0.0)
    partly_out = random.masked_fill(torch.rand(6, V, generator=generator) < 0.5, float("-inf"))
    return {
        "random": random,
        "tied": tied,
        "one_hot": one_hot,
        "flat": torch.zeros(2, V),
        "halves": halves,
        "partly_out": partly_out,
    }


CASES = cases()


@pytest.mark.parametrize("logits", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("filter_ours", "filter_theirs"),
    [
        *((lambda x, k=k: keep_top_k(x, k), oracle.TopKLogitsWarper(k)) for k in (1, 2, 10, 50, V, 500)),
        *((lambda x, p=p: keep_top_p(x, p), oracle.TopPLogitsWarper(p)) for p in (0.0, 0.1, 0.5, 0.9, 0.999)),
        *((lambda x, p=p: keep_min_p(x, p), oracle.MinPLogitsWarper(p)) for p in (0.01, 0.1, 0.5, 1.0)),
    ],
)
def test_kept_tokens_are_those_of_transformers(logits, filter_ours, filter_theirs):
    ours, theirs = filter_ours(logits), filter_theirs(torch.zeros(1, 1, dtype=torch.long), logits)
    assert torch.equal(ours, theirs)
    assert ours.isfinite().any(dim=1).all()


@pytest.mark.parametrize("logits", CASES.values(), ids=CASES)
def test_the_filters_run_in_transformers_order(logits):
    config = GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    theirs = logits
    for warper in (
        oracle.TemperatureLogitsWarper(0.7),
        oracle.TopKLogitsWarper(20),
        oracle.TopPLogitsWarper(0.8),
        oracle.MinPLogitsWarper(0.05),
    ):
        theirs = warper(torch.zeros(1, 1, dtype=torch.long), theirs)
    assert torch.equal(warp(logits, config), theirs)


def test_a_filter_that_is_off_changes_nothing():
    logits = CASES["random"]
    assert torch.equal(warp(logits, GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)), logits)
    assert torch.equal(warp(logits, GenerationConfig()), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_transformers(penalty):
    logits = CASES["random"]
    ids = torch.randint(0, V, (6, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, V, dtype=torch.bool).scatter_(1, ids, True)
    theirs = oracle.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, penalty), theirs)


def test_forbidden_tokens_cannot_be_chosen():
    assert forbid(CASES["flat"], [3, 8]).isinf().nonzero()[:, 1].tolist() == [3, 8, 3, 8]


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("seeded", [True, False])
def test_twenty_thousand_draws_follow_the_softmax(seeded):
    torch.manual_seed(5)
    draws, size = 20_000, 40
    logits = torch.linspace(-2, 2, size)[torch.randperm(size)]
    rows = logits.expand(draws, size)
    noise = seeded_noise(rows, [7] * draws, range(draws)) if seeded else free_noise(rows)
    counts = torch.bincount(draw(rows, noise), minlength=size).float()
    # 39 degrees of freedom: above 75 once in 2,000 runs; the seeds are fixed, so this is one run.
    assert chi_square(counts, logits.softmax(dim=0)) < 75


def test_neighbouring_seeds_have_nothing_in_common():
    rows = torch.zeros(2000, 5)
    first, second = (draw(rows, seeded_noise(rows, [seed] * 2000, range(2000))) for seed in (0, 1))
    assert 0.17 < (first == second).float().mean() < 0.23


def test_noise_depends_on_seed_and_position_and_not_on_the_row():
    noise = seeded_noise(torch.zeros(4, V), [1, 1, 2, 1], [5, 6, 5, 5])
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_a_token_that_is_not_kept_is_never_drawn_whatever_the_noise():
    logits = torch.tensor([[0.0, float("-inf")]])
    for noise in ([[1.0, 0.0]], [[float("inf"), 0.0]], [[1e30, 1e-45]]):
        assert draw(logits, torch.tensor(noise)).item() == 0
