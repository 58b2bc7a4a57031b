"""Every exchange gives what one process gives: outputs, and every gradient, whoever has tokens or experts."""

import pytest
import torch

from moebius.distributed.exchange import EXCHANGES, choose
from moebius.distributed.layout import ExpertLayout
from moebius.errors import ArgumentError
from tests.distributed.exchanging import PARAMETERS, Case, H, cases, distances, inputs, parallel, results
from tests.distributed.pool import run_ranks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_outputs_and_every_gradient_are_those_of_one_process(size):
    for found in run_ranks(size, distances, cases(size)):
        assert {case: of_case for case, of_case in found.items() if max(of_case.values()) > 1e-12} == {}
        assert all(of_case.keys() == {"output", "states", "weights", *PARAMETERS} for of_case in found.values())


TRAINED = [frozenset(), frozenset({"experts"}), frozenset({"weights"}), frozenset({"states"})]


@pytest.mark.parametrize("trained", TRAINED, ids=lambda names: "+".join(names) or "nothing")
def test_no_rank_is_left_waiting_whatever_has_gradients(trained):
    few = [Case(name, 1, trained=trained) for name in EXCHANGES if name != "local"]
    for found in run_ranks(2, distances, few):
        assert {case: of_case for case, of_case in found.items() if max(of_case.values()) > 1e-12} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_and_weights_travel_in_their_own_dtypes(dtype):
    few = [Case(name, 5, dtype=dtype, weights_dtype=torch.float32) for name in EXCHANGES if name != "local"]
    for found in run_ranks(3, distances, few):
        assert max(max(of_case.values()) for of_case in found.values()) < 4 * torch.finfo(dtype).eps


def test_where_nobody_said_how_many_tokens_come_ranks_are_asked():
    few = [Case(name, 4, "idle", announced=False) for name in ("gather_scatter", "by_tokens")]
    for found in run_ranks(3, distances, few):
        assert max(max(of_case.values()) for of_case in found.values()) < 1e-12


def add_up_what_others_keep(ranks):
    """exp keeps its output for its backward, and a sum gives both its terms one gradient: none is added up in place."""
    states = torch.linspace(-1, 1, 3 * H, dtype=torch.float64).view(3, H).requires_grad_()
    other = torch.zeros_like(states).requires_grad_()
    term = other * 2
    exchange = EXCHANGES["all_reduce"](ranks.experts, ExpertLayout(4, ranks.size))
    visit = exchange.dispatch(states, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    visit.combine(((visit.hidden_states + term) * (ranks.rank + 1)).exp()).sum().backward()
    parts = [(rank + 1) * (states.detach() * (rank + 1)).exp() for rank in range(ranks.size)]
    torch.testing.assert_close(other.grad, 2 * parts[ranks.rank])
    torch.testing.assert_close(states.grad, sum(parts))


def test_sums_are_not_written_over_what_others_keep():
    run_ranks(2, add_up_what_others_keep)


def bring_other_than_announced(ranks):
    case = Case("gather_scatter", 4)
    given = inputs(case, 3)
    with pytest.raises(ArgumentError, match="brings 3 tokens to its experts, where the step was announced with 9"):
        results(case, parallel(case, ranks, [9, 9]), given)


def test_a_step_other_than_announced_is_refused():
    run_ranks(2, bring_other_than_announced)


def rows_of_visits(ranks, name):
    """How many rows a rank works on, and how many of them have ids, when r + 4 tokens of rank r need 3 of rank 1."""
    tokens = 4 + ranks.rank
    exchange = EXCHANGES[name](ranks.experts, ExpertLayout(3 * ranks.size, ranks.size))
    index = torch.tensor([[3, 4, 5]]).expand(tokens, 3)
    visit = exchange.dispatch(torch.ones(tokens, H), index, torch.ones(tokens, 3))
    return len(visit.hidden_states), int((visit.top_k_index >= 0).all(dim=1).sum())


@pytest.mark.parametrize(
    ("name", "rows"), [("all_to_all", [(0, 0), (15, 15), (0, 0)]), ("gather_scatter", [(18, 15)] * 3)]
)
def test_a_token_travels_once_to_a_rank_where_it_has_several_experts_and_padding_is_nobodys(name, rows):
    assert run_ranks(3, rows_of_visits, name) == rows


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("distinct", "auto", 1, 8, True), "local"),
        (("shared", "auto", 64, 8, False), "all_reduce"),
        (("distinct", "auto", 4, 8, True), "gather_scatter"),
        (("distinct", "auto", 8, 8, True), "by_tokens"),
        (("distinct", "auto", 16, 8, True), "all_to_all"),
        (("distinct", "auto", 4, 8, False), "all_to_all"),
        (("distinct", "all_to_all", 2, 8, True), "all_to_all"),
    ],
)
def test_auto_chooses_by_batch_ranks_and_hosts(arguments, name):
    assert choose(*arguments).name == name


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level("INFO", logger="moebius"):
        for _ in range(2):
            choose("distinct", "auto", 999, 77, True)
    assert caplog.messages == ["exchange: all_to_all, a token visits 77 of 999 ranks at most"]
