"""Backends are named, registered, chosen, and never replaced in silence."""

import logging

import pytest
import torch

from moebius.config import SoftmaxTopK, SparseMoe
from moebius.errors import ArgumentError, BackendError
from moebius.experts import interface
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS, Experts, use_experts_implementation

CONFIG = SparseMoe(4, 2, 8, SoftmaxTopK(renormalize=True))


def filled(experts: Experts) -> Experts:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return experts


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 16), torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, 2)


@pytest.fixture
def mine():
    ALL_EXPERTS_FUNCTIONS.register("mine", lambda experts, hidden_states, index, weights: hidden_states * 3)
    yield "mine"
    del ALL_EXPERTS_FUNCTIONS._functions["mine"]


def test_the_built_in_backends_are_listed():
    assert set(ALL_EXPERTS_FUNCTIONS) == {"eager", "batched_mm", "grouped_mm", "fused", "cpu"}


def test_a_users_backend_works_at_construction(mine):
    states, index, weights = inputs()
    experts = filled(Experts(CONFIG, 16, experts_implementation=mine))
    assert torch.equal(experts(states, index, weights), states * 3)


def test_a_users_backend_works_at_run_time_and_can_be_left_again(mine):
    states, index, weights = inputs()
    experts = filled(Experts(CONFIG, 16))
    before = experts(states, index, weights)
    experts.set_experts_implementation(mine)
    assert torch.equal(experts(states, index, weights), states * 3)
    experts.set_experts_implementation("auto")
    assert torch.equal(experts(states, index, weights), before)


def test_an_unknown_backend_is_refused_with_the_nearest_name_first():
    with pytest.raises(BackendError, match=r"'grouped_nm'; known: grouped_mm, "):
        Experts(CONFIG, 16, experts_implementation="grouped_nm")
    with pytest.raises(BackendError, match="register"):
        filled(Experts(CONFIG, 16)).set_experts_implementation("fusd")


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_names_with_a_meaning_cannot_be_registered(name):
    with pytest.raises(ArgumentError, match=name):
        ALL_EXPERTS_FUNCTIONS.register(name, lambda *args: args[1])


def test_a_named_backend_that_cannot_run_raises_with_every_reason(monkeypatch):
    monkeypatch.setattr(interface, "backend_obstacles", lambda name, situation: ["too odd", "too small"])
    experts = filled(Experts(CONFIG, 16, experts_implementation="grouped_mm"))
    with pytest.raises(BackendError) as raised:
        experts(*inputs())
    assert "too odd" in str(raised.value)
    assert "too small" in str(raised.value)


def test_auto_says_once_what_it_chose(caplog):
    experts = filled(Experts(CONFIG, 16))
    interface._chosen.cache_clear()
    with caplog.at_level(logging.INFO, "moebius.experts"):
        experts(*inputs())
        experts(*inputs())
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["experts: grouped_mm"]


def test_states_narrower_than_the_weights_come_back_in_their_own_dtype():
    states, index, weights = inputs()
    experts = filled(Experts(CONFIG, 16))
    assert experts(states.bfloat16(), index, weights).dtype == torch.bfloat16


def test_a_decorated_class_runs_its_own_forward_as_eager(mine):
    @use_experts_implementation
    class Doubled(Experts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states * 2

    states, index, weights = inputs()
    doubled = Doubled(CONFIG, 16, experts_implementation="eager")
    assert torch.equal(doubled(states, index, weights), states * 2)
    doubled.set_experts_implementation(mine)
    assert torch.equal(doubled(states, index, weights), states * 3)
