"""The loss of a step: the decoder's own, or with each layer's experts balanced by themselves."""

import math

import pytest
import torch

from moebius.training.loss import balance_by_layer, step_losses

INPUT_IDS = torch.arange(40).view(2, 20)


def test_pooled_is_the_loss_of_the_decoder_itself(decoder):
    loss, balance = step_losses(decoder, INPUT_IDS, "pooled")
    whole = decoder(INPUT_IDS, labels=INPUT_IDS, output_router_logits=True)
    assert balance is not None
    assert (loss + balance).item() == pytest.approx(whole.loss.item())
    assert balance.item() == pytest.approx(0.01 * whole.aux_loss.item())


def test_none_leaves_the_cross_entropy_alone(decoder):
    loss, balance = step_losses(decoder, INPUT_IDS, "none")
    assert balance is None
    assert loss.item() == decoder(INPUT_IDS, labels=INPUT_IDS).loss.item()


def test_by_layer_is_the_formula_averaged_over_layers(decoder):
    _, balance = step_losses(decoder, INPUT_IDS, "layer")
    router_logits = decoder(INPUT_IDS, output_router_logits=True).router_logits
    expected = 0.0
    for layer in (logits.detach() for logits in router_logits):
        shares = torch.bincount(layer.topk(2).indices.flatten(), minlength=4) / len(layer)
        expected += float(4 * (shares * layer.softmax(-1).mean(0)).sum()) / len(router_logits)
    assert balance is not None
    assert balance.item() == pytest.approx(0.01 * expected)


def test_an_idle_expert_costs_by_layer_even_if_its_namesake_is_busy():
    # layer 0 sends all to expert 0, layer 1 to expert 1: pooled, that looks even
    layers = [math.log(1e6) * torch.nn.functional.one_hot(torch.full((6,), e), 2).float() for e in (0, 1)]
    assert balance_by_layer(layers, [1, 1]).item() == pytest.approx(2.0, rel=1e-3)
    assert balance_by_layer([torch.cat(layers)], [1]).item() == pytest.approx(1.0, rel=1e-3)


def test_the_balance_pushes_every_router(decoder):
    _, balance = step_losses(decoder, INPUT_IDS, "layer")
    assert balance is not None
    balance.backward()
    gates = [layer.mlp.gate.weight.grad for layer in decoder.model.layers]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in gates)
