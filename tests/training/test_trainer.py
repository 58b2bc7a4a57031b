"""The training loop: it learns, does what its settings say, repeats to the bit, and stops at a loss of NaN."""

import copy

import pytest
import torch

from moebius.errors import MoebiusError
from moebius.training.config import TrainingConfig, learning_rate_at
from moebius.training.data import TokenWindows
from moebius.training.share import Whole
from moebius.training.trainer import train


@pytest.fixture
def batches():
    tokens = torch.arange(2000) % 7 + 3 * (torch.arange(2000) % 5)
    return TokenWindows(tokens, batch_size=4, seq_len=12).batch


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"steps": 30, "batch_size": 4, "seq_len": 12, "learning_rate": 1e-2, **changes})


def test_a_pattern_in_the_text_is_learned(decoder, batches):
    result = train(decoder, batches, settings(steps=60))
    assert result.records[0].loss > 4.0
    assert result.records[-1].loss < 1.5


def test_a_run_repeats_to_the_bit(decoder, batches):
    twin = copy.deepcopy(decoder)
    first = train(decoder, batches, settings())
    second = train(twin, batches, settings())
    assert [record.loss for record in first.records] == [record.loss for record in second.records]
    twin_state = twin.state_dict()
    assert all(torch.equal(tensor, twin_state[name]) for name, tensor in decoder.state_dict().items())


def test_each_step_is_reported_as_it_ends(decoder, batches):
    seen = []
    result = train(decoder, batches, settings(steps=5, warmup_steps=2), on_step=seen.append)
    assert tuple(seen) == result.records
    assert [record.step for record in seen] == [0, 1, 2, 3, 4]
    assert [record.learning_rate for record in seen] == [
        learning_rate_at(settings(steps=5, warmup_steps=2), step) for step in range(5)
    ]
    assert {record.tokens for record in seen} == {4 * 11}


def test_one_step_is_adamw_on_the_loss(decoder, batches):
    twin = copy.deepcopy(decoder)
    config = settings(steps=1, weight_decay=0.1, max_grad_norm=0.5)
    record = train(decoder, batches, config).records[0]
    output = twin(batches(0), labels=batches(0), output_router_logits=True)
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False, fused=False).step()
    assert record.loss + record.aux_loss == pytest.approx(output.loss.item())
    assert record.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(decoder.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_auxiliary_loss_is_told_apart_and_can_be_switched_off(decoder, batches):
    twin = copy.deepcopy(decoder)
    balanced = train(decoder, batches, settings(steps=1)).records[0]
    plain = train(twin, batches, settings(steps=1, balance_scope="none")).records[0]
    assert balanced.loss == pytest.approx(plain.loss)
    assert balanced.aux_loss == pytest.approx(0.01 * 2, rel=0.2)  # coefficient * K, near balance
    assert plain.aux_loss == 0.0
    assert not torch.equal(decoder.model.layers[0].mlp.gate.weight, twin.model.layers[0].mlp.gate.weight)


def test_a_frozen_parameter_is_left_alone(decoder, batches):
    frozen = decoder.model.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    train(decoder, batches, settings(steps=2))
    assert torch.equal(frozen, before)


def test_every_choice_of_every_layer_is_counted(decoder, batches):
    result = train(decoder, batches, settings(steps=3))
    assert result.expert_load.shape == (2, 4)
    assert result.expert_load.sum(dim=1).tolist() == [3 * 4 * 12 * 2] * 2


def test_a_loss_that_is_no_number_ends_the_run_before_it_touches_a_weight(decoder, batches):
    decoder.model.norm.weight.data[0] = float("nan")
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(MoebiusError, match="step 0: the loss is nan"):
        train(decoder, batches, settings())
    torch.testing.assert_close(decoder.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_clipping_scales_all_gradients_by_one_factor(decoder):
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert Whole(decoder).clip(1.0).item() == pytest.approx(count**0.5, rel=1e-5)
    values = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]).unique()
    assert values.tolist() == pytest.approx([count**-0.5] * len(values), rel=1e-4)
