"""Generating on ranks, through the front door: on a shared batch one rank chooses for all, else each has its own.

Functions whose names end in `on` run on each rank.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import ArgumentError, AutoModelForCausalLM, MoebiusError
from moebius.distributed.ranks import Ranks
from tests.distributed.pool import run_ranks
from tests.model_folders import ids_for, saved_model

SHARED: dict[str, Any] = {"enable_expert_parallel": True}
DISTINCT = {**SHARED, "batch": "distinct"}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of random weights; neither 2 nor 3 ranks can share its experts evenly."""
    return saved_model(tmp_path_factory.mktemp("hub") / "model", "qwen3_moe", seed=3, num_experts=5)


def opened(folder: Path, config: Any = SHARED) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


class Heard:
    """A streamer that counts what it is told."""

    def __init__(self) -> None:
        self.times = 0

    def put(self, value: torch.Tensor) -> None:
        self.times += 1

    def end(self) -> None:
        pass


def sampled_on(ranks: Ranks, folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    model, heard = opened(folder), Heard()
    torch.manual_seed(ranks.rank)  # no two ranks would choose alike
    ids, noisy = ids_for(model, batch=3), {"do_sample": True, "temperature": 3.0, "repetition_penalty": 1.3}
    tokens = model.generate(ids, max_new_tokens=12, streamer=heard, **noisy)
    calls = iter(range(100))
    ended = model.generate(ids, max_new_tokens=40, stopping_criteria=[lambda ids, _: next(calls) > 2 + ranks.rank])
    return tokens, ended, heard.times


def test_one_rank_chooses_for_all_of_a_shared_batch_and_it_alone_streams(folder):
    (tokens, ended, heard), *others = run_ranks(2, sampled_on, folder)
    assert all(torch.equal(tokens, each) and torch.equal(ended, end) for each, end, _ in others)
    assert ended.shape[1] == 24 + 4
    assert heard > 1
    assert [times for *_, times in others] == [0]


PROMPTS = [(1, 3), (4, 17), (2, 9)]
"""[B, T] of each rank."""


def own_prompt(model: Any, rank: int) -> torch.Tensor:
    return ids_for(model, *PROMPTS[rank])


def continued_on(ranks: Ranks, folder: Path) -> list[torch.Tensor]:
    model = opened(folder, DISTINCT)
    new = {"max_new_tokens": 3 + 7 * ranks.rank, "do_sample": False}
    return [model.generate(own_prompt(model, ranks.rank), **new) for _ in range(2)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_continues_prompts_of_its_own(folder, ranks):
    one = AutoModelForCausalLM.from_pretrained(folder)
    for rank, found in enumerate(run_ranks(ranks, continued_on, folder)):
        expected = one.generate(own_prompt(one, rank), max_new_tokens=3 + 7 * rank, do_sample=False)
        assert all(torch.equal(each, expected) for each in found)


def idle_on(ranks: Ranks, folder: Path) -> torch.Tensor:
    model = opened(folder, DISTINCT)
    return model.generate(own_prompt(model, 1) if ranks.rank else torch.empty(0, 4, dtype=torch.int64), **GREEDY)


def test_a_rank_without_prompts_serves_the_others(folder):
    idle, *others = run_ranks(3, idle_on, folder)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert idle.shape == (0, 4)
    assert all(torch.equal(each, alone.generate(own_prompt(alone, 1), **GREEDY)) for each in others)


def refused_on(ranks: Ranks, folder: Path) -> Any:
    """Rank 1 is given a prompt that no model takes; the others theirs."""
    model = opened(folder, DISTINCT)
    ids = own_prompt(model, ranks.rank) + (10_000 if ranks.rank == 1 else 0)
    try:
        return model.generate(ids, **GREEDY)
    except MoebiusError as error:
        return str(error)


def test_a_prompt_that_is_refused_on_one_rank_leaves_the_others_theirs(folder):
    first, second = run_ranks(2, refused_on, folder)
    one = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(first, one.generate(own_prompt(one, 0), **GREEDY))
    assert "10" in second


def prompts_on(ranks: Ranks, folder: Path) -> str:
    model = opened(folder)
    try:
        model.generate(ids_for(model)[ranks.rank : ranks.rank + 1], **GREEDY)
    except ArgumentError as error:
        return str(error)
    return "no error"


def test_different_prompts_for_a_shared_batch_are_an_error_on_every_rank(folder):
    found = run_ranks(2, prompts_on, folder)
    assert all("rank 1" in each and 'batch="distinct"' in each for each in found)


Options = dict[str, Any]


def settings_on(ranks: Ranks, folder: Path, cases: list[tuple[Options, Options]]) -> list[str]:
    """What is said of each pair: rank 0's options, and the others'."""
    model, said = opened(folder), []
    for pair in cases:
        try:
            model.generate(ids_for(model), max_new_tokens=3, pad_token_id=0, **pair[min(ranks.rank, 1)])
            said.append("nothing")
        except ArgumentError as error:
            said.append(str(error))
    return said


OTHER = "generate: ranks were given different settings"
DIFFERENT: dict[str, tuple[Options, Options]] = {
    f"{OTHER}: rank 1: eos_token_id: (1,), rank 0 has (2, 3)": ({"eos_token_id": [2, 3]}, {"eos_token_id": [1]}),
    f"{OTHER}: rank 1: stop_strings: ('b',), rank 0 has ('a',)": ({"stop_strings": ["a"]}, {"stop_strings": "b"}),
    f"{OTHER}: rank 1: max_length: 30, rank 0 has None": ({}, {"max_length": 30}),
    f"{OTHER}: rank 1: stopping_criteria: False, rank 0 has True": ({"stopping_criteria": [print]}, {}),
}


def test_settings_that_differ_are_an_error_on_every_rank_before_the_first_step(folder):
    assert run_ranks(2, settings_on, folder, list(DIFFERENT.values())) == [list(DIFFERENT)] * 2


def test_settings_in_other_words_are_the_same(folder):
    same: list[tuple[Options, Options]] = [({"eos_token_id": 1}, {"eos_token_id": [1]}), ({"top_k": 50}, {})]
    assert run_ranks(2, settings_on, folder, same) == [["nothing"] * 2] * 2


def test_an_option_that_is_refused_on_one_rank_is_every_ranks_error(folder):
    (first,), (second,) = run_ranks(2, settings_on, folder, [({}, {"num_beams": 4})])
    assert "num_beams: not supported" in second
    assert first == f"rank 1: {second}"
