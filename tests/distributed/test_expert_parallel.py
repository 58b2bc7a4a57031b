"""A decoder whose experts are on several ranks gives what it gives in one process: logits, loss, every gradient.

N ranks, B batch, T tokens of a sequence.
"""

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from moebius.distributed.config import Batch, DistributedConfig
from moebius.distributed.ranks import Ranks, join
from moebius.errors import BackendError
from moebius.layers.decoder import CausalLMOutput, Decoder
from moebius.quantization.forms import BlockFp8, Form, Int8, PackedInt4
from tests.distributed.decoders import expert_rows, of_rows, parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks

MODELS: list[tuple[str, dict[str, int]]] = [
    ("mixtral", {}),  # 4 experts
    ("mixtral", {"num_local_experts": 2}),  # fewer than ranks
    ("gpt_oss", {}),  # biases
    ("qwen2_moe", {}),  # a gated shared expert
    ("deepseek_v3", {}),  # a shared expert, and a dense layer
]
BATCHES: tuple[Batch, ...] = ("shared", "distinct")
SHAPES = [(2, 7), (0, 4), (1, 5), (3, 3)]
"""[B, T] of each rank's own batch; one has nothing."""


def token_ids(batch: Batch, rank: int) -> Tensor:
    seed, shape = (0, (2, 9)) if batch == "shared" else (rank, SHAPES[rank])
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def answered(decoder: Decoder, ids: Tensor) -> CausalLMOutput:
    """With a loss, of no tokens zero, whose gradient has been computed."""
    output = decoder(ids, labels=ids, output_router_logits=False)
    loss = output.loss if len(ids) else output.logits.sum()
    assert loss is not None
    (loss + (output.logits.sin().mean() if len(ids) else 0)).backward()
    return output


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    return {name: each.grad.cpu() for name, each in decoder.named_parameters() if each.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest number, if that is above 1."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def distances(
    ranks: Ranks, batch: Batch, family: str, changes: dict[str, int], form: Form | None = None
) -> dict[str, float]:
    """Of this rank's logits, loss and gradients; those of experts in a form there are not."""
    whole = whole_decoder(family, form, **changes)
    decoder, _ = parallel_decoder(whole, ranks, batch)
    whole.to(ranks.device)
    ids = [token_ids(batch, rank).to(ranks.device) for rank in range(ranks.size)]
    expected = [answered(whole, each) for each in (ids[:1] if batch == "shared" else ids)]
    reference = expected[0 if batch == "shared" else ranks.rank]
    output = answered(decoder, ids[ranks.rank])
    found = {"logits": distance(output.logits, reference.logits)}
    if output.logits.numel():
        found["loss"] = abs(output.loss.item() - reference.loss.item())
    return found | gradient_distances(decoder, whole, ranks, batch)


def gradient_distances(decoder: Decoder, whole: Decoder, ranks: Ranks, batch: Batch) -> dict[str, float]:
    rows, expected = expert_rows(decoder), gradients(whole)
    mine = gradients(decoder)
    assert mine.keys() == expected.keys()
    total = mine if batch == "shared" else added_up(mine, rows.keys(), ranks)
    return {name: distance(grad, of_rows(expected[name], rows.get(name))) for name, grad in total.items()}


def added_up(mine: dict[str, Tensor], experts: Collection[str], ranks: Ranks) -> dict[str, Tensor]:
    """Over ranks with batches of their own; experts', which have seen all tokens of their set, over copies alone."""
    of_all = ranks.gathered(mine, "adding up gradients")
    copies = of_all[ranks.place :: ranks.grid.ep]
    return {name: sum(each[name] for each in (copies if name in experts else of_all)) for name in mine}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("family", "changes"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_decoder_on_three_ranks_is_the_decoder_of_one(batch, family, changes):
    for found in run_ranks(3, distances, batch, family, changes):
        assert {name: far for name, far in found.items() if far > 1e-5} == {}


def distances_in_sets(ranks: Ranks, ep: int) -> dict[str, float]:
    sets = join(DistributedConfig(ep_size=ep, batch="distinct"), 8, device_type="cpu")
    return distances(sets, "distinct", "gpt_oss", {})


@pytest.mark.parametrize("ep", [1, 2])
def test_several_sets_of_experts_are_copies_of_one_another(ep):
    for found in run_ranks(4, distances_in_sets, ep):
        assert {name: far for name, far in found.items() if far > 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("family", "changes"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_decoder_on_other_numbers_of_ranks_is_the_decoder_of_one(batch, size, family, changes):
    for found in run_ranks(size, distances, batch, family, changes):
        assert {name: far for name, far in found.items() if far > 1e-5} == {}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", [Int8(), PackedInt4(32), BlockFp8((16, 32))], ids=lambda form: form.name)
def test_experts_stay_quantized_on_their_ranks(form, batch):
    for found in run_ranks(3, distances, batch, "qwen2_moe", {}, form):
        assert {name: far for name, far in found.items() if far > 1e-5} == {}
        assert "model.layers.0.mlp.gate.weight" in found
        assert not any(".experts." in name for name in found)


def narrow_distances(ranks: Ranks, batch: Batch) -> dict[str, float]:
    with torch.autocast("cpu", torch.bfloat16):
        return distances(ranks, batch, "mixtral", {})


@pytest.mark.parametrize("batch", BATCHES)
def test_under_autocast_narrow_states_meet_wide_weights(batch):
    for found in run_ranks(3, narrow_distances, batch):
        assert {name: far for name, far in found.items() if far > 0.05} == {}


def describe(ranks: Ranks) -> tuple[str | None, set[str], int, str]:
    decoder, _ = parallel_decoder(whole_decoder("gpt_oss"), ranks, "shared")
    decoder.set_experts_implementation("eager")
    report = {choice.name for choice in decoder.experts_report(training=True).values()}
    with pytest.raises(BackendError) as caught:
        decoder.set_experts_implementation("nobody")
    held = sum(each.numel() for name, each in decoder.named_parameters() if name.endswith("experts.gate_up_proj"))
    return decoder.experts_backend("cpu"), report, held, str(caught.value).splitlines()[0][:50]


def test_backends_are_told_and_chosen_as_on_one_rank():
    found = run_ranks(3, describe)
    assert {(backend, *report) for backend, report, _, _ in found} == {("eager", "eager")}
    one_expert = 2 * 2 * 32 * 64  # layers, gate and up, intermediate, hidden
    assert [held // one_expert for _, _, held, _ in found] == [3, 3, 2]
    assert {text for *_, text in found} == {"experts_implementation: unknown backend 'nobody'; k"[:50]}
