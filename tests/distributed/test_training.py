"""Training with experts on several ranks: losses, norms, weights and states are those of one process.

N ranks; each run is 20 steps of AdamW in float32 on the same batches.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from moebius import AutoModelForCausalLM
from moebius.distributed import gradients
from moebius.distributed.config import DistributedConfig
from moebius.distributed.expert_parallel import parallel_experts
from moebius.distributed.ranks import Ranks, join
from moebius.distributed.sharding import shard
from moebius.distributed.spread import local, spread_of
from moebius.errors import ArgumentError, CheckpointError
from moebius.layers.decoder import IGNORED_LABEL, Decoder
from moebius.training.config import TrainingConfig
from moebius.training.data import TokenWindows
from moebius.training.share import share_of
from moebius.training.states import StateFolder
from moebius.training.trainer import TrainingResult, train
from tests.distributed.pool import run_ranks
from tests.families import randomize
from tests.families import tiny_config as hub_config
from tests.training.models import tiny_config

TEXT = torch.arange(2000) % 7 + 3 * (torch.arange(2000) % 5) + torch.arange(2000) // 900
BATCHES = TokenWindows(TEXT, batch_size=7, seq_len=12).batch
SETTINGS = TrainingConfig(
    steps=20, batch_size=7, seq_len=12, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=3
)


@dataclass(frozen=True)
class Case:
    ranks: int
    experts: int
    fields: dict[str, Any]
    scope: str = "pooled"

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.experts} experts, {self.fields}, {self.scope}"


DISTINCT = {"enable_expert_parallel": True, "batch": "distinct"}
CASES = [
    Case(2, 4, DISTINCT),
    Case(2, 5, {"enable_expert_parallel": True}),
    Case(3, 4, DISTINCT, "layer"),
    Case(4, 5, {"ep_size": 2, "batch": "distinct", "fsdp_size": 4}),
    Case(2, 4, {"enable_expert_parallel": True, "fsdp_size": 2}),
]
EXPERTLESS = Case(6, 2, {"ep_size": 3, "batch": "distinct", "fsdp_size": 6})
"""A set of experts is on two ranks, and two ranks have none."""
MORE_CASES = [
    EXPERTLESS,
    Case(2, 5, {**DISTINCT, "exchange": "all_to_all"}, "layer"),
    Case(3, 2, {"ep_size": 3, "batch": "distinct"}),
    Case(4, 5, {"ep_size": 2, "batch": "distinct"}),
    Case(4, 4, {"ep_size": 4, "batch": "distinct", "fsdp_size": 4}),
    Case(4, 3, {"ep_size": 2, "batch": "distinct", "fsdp_size": 2}),
    Case(4, 3, {"ep_size": 1, "batch": "distinct", "fsdp_size": 2}),
    Case(4, 5, {"ep_size": 2, "fsdp_size": 4}),
    Case(4, 4, {"ep_size": 2, "fsdp_size": 2}),
]


def weights(experts: int) -> dict[str, torch.Tensor]:
    whole = Decoder(tiny_config(experts))
    whole.init_weights(torch.Generator().manual_seed(0))
    return {name: tensor.detach() * 2 for name, tensor in whole.state_dict().items()}  # routers that are sure


def decoder_of(case: Case, ranks: Ranks) -> Decoder:
    """This rank's part of the model."""
    config = DistributedConfig(**case.fields)
    mine = join(config, case.experts, device_type=ranks.device.type)
    with mine.device:
        decoder = Decoder(tiny_config(case.experts), experts_class=parallel_experts(mine, config))
    if config.fsdp_size > 1:
        shard(decoder, mine)
    spread, whole = spread_of(decoder), weights(case.experts)
    assert spread is not None
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            rows = spread.boxes.get(name, range(len(whole[name])))
            local(parameter).copy_(whole[name][rows.start : rows.stop])
    return decoder


def trained(ranks: Ranks, case: Case) -> tuple[TrainingResult, dict[str, tuple[int, torch.Tensor]]]:
    """The result, and the rows that this rank holds at the end: {name: (first row, rows)}."""
    decoder = decoder_of(case, ranks)
    result = train(decoder, lambda step: BATCHES(step).to(ranks.device), SETTINGS_OF[case.scope])
    boxes, held = spread_of(decoder).boxes, decoder.named_parameters()
    return result, {name: (_first(boxes.get(name)), local(each.detach()).cpu()) for name, each in held}


def _first(rows: range | None) -> int:
    return rows.start if rows else 0


SETTINGS_OF = {scope: TrainingConfig(**{**vars(SETTINGS), "balance_scope": scope}) for scope in ("pooled", "layer")}


@cache
def alone(experts: int, scope: str) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
    decoder = Decoder(tiny_config(experts))
    decoder.load_state_dict(weights(experts))
    result = train(decoder, BATCHES, SETTINGS_OF[scope])
    return result, {name: each.detach() for name, each in decoder.named_parameters()}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_twenty_steps_are_those_of_one_process(case):
    assert_as_alone(run_ranks(case.ranks, trained, case), case)


def assert_as_alone(found: list[Any], case: Case) -> None:
    """Losses, norms, counts and weights of all ranks are those of one process."""
    expected, whole = alone(case.experts, case.scope)
    for result, held in found:
        for one, two in zip(result.records, expected.records, strict=True):
            assert one.loss == pytest.approx(two.loss, abs=1e-5)
            assert one.aux_loss == pytest.approx(two.aux_loss, abs=1e-6)
            assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-5)
            assert one.tokens == two.tokens
        assert torch.equal(result.expert_load, expected.expert_load)
        for name, (first, rows) in held.items():
            torch.testing.assert_close(rows, whole[name][first : first + len(rows)], atol=1e-5, rtol=1e-5)


def trained_in_small_buckets(ranks: Ranks, case: Case) -> Any:
    with mock.patch.object(gradients, "BUCKET_BYTES", 1):
        return trained(ranks, case)


def test_a_gradient_larger_than_a_bucket_is_added_up_too():
    assert_as_alone(run_ranks(2, trained_in_small_buckets, CASES[0]), CASES[0])


MASKED = [[0.9, 0.5, 0.3, 0, 0, 0, 0.2], [0, 0, 0.4, 0, 1, 1, 1]]
"""Of each sequence, how much is not labelled, in two batches; in the second, some ranks have no label."""


def own_step(decoder: Decoder) -> tuple[float, dict[str, torch.Tensor]]:
    """A step of a loop of one's own, as docs/parallel.md has it, over two batches: its norm, and local gradients."""
    share = share_of(decoder)
    for number, masked in enumerate(MASKED):
        input_ids = BATCHES(number)
        labels = input_ids.clone()
        for row, part in enumerate(masked):
            labels[row, : int(part * labels.shape[1])] = IGNORED_LABEL
        rows, labels = share.rows(input_ids), share.rows(labels)
        loss = share.part(decoder(rows, labels=labels).loss, labels) / len(MASKED)
        loss.backward()
    norm = share.clip(0.5)
    return float(norm), {name: local(each.grad) for name, each in decoder.named_parameters()}


def own_step_on(ranks: Ranks, case: Case) -> tuple[float, dict[str, torch.Tensor], dict[str, range]]:
    decoder = decoder_of(case, ranks)
    return *own_step(decoder), dict(spread_of(decoder).boxes)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_a_loop_of_ones_own_has_the_gradients_of_one_process(case):
    whole = Decoder(tiny_config(case.experts))
    whole.load_state_dict(weights(case.experts))
    norm, expected = own_step(whole)
    for found_norm, found, boxes in run_ranks(case.ranks, own_step_on, case):
        assert found_norm == pytest.approx(norm, rel=1e-5)
        for name, gradient in found.items():
            rows = boxes.get(name, range(len(expected[name])))
            torch.testing.assert_close(gradient, expected[name][rows.start : rows.stop], atol=1e-6, rtol=1e-5)


# --- states ---------------------------------------------------------------------------------------------------------


def run_to(ranks: Ranks, case: Case, steps: int, path: Path) -> list[float]:
    config = TrainingConfig(**{**vars(SETTINGS), "steps": steps, "schedule": "constant"})
    return [record.loss for record in train(decoder_of(case, ranks), BATCHES, config, states=StateFolder(path)).records]


MOVES = [CASES[3], Case(3, 5, DISTINCT), CASES[1]]
EXPERTLESS_MOVES = [EXPERTLESS, Case(2, 2, DISTINCT), EXPERTLESS]


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param(MOVES, id="every rank has experts"),
        pytest.param(EXPERTLESS_MOVES, id="some have none", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_any_number_of_ranks(tmp_path, moves):
    """FSDP2, then more ranks or fewer, then one process: as if it had never been moved."""
    path, config = tmp_path / "state", TrainingConfig(**{**vars(SETTINGS), "steps": 8, "schedule": "constant"})
    losses, experts = list[float](), moves[0].experts
    for case, steps in zip(moves, (2, 4, 6), strict=True):
        losses += run_ranks(case.ranks, run_to, case, steps, path)[0]
    decoder, whole = Decoder(tiny_config(experts)), Decoder(tiny_config(experts))
    losses += [record.loss for record in train(decoder, BATCHES, config, states=StateFolder(path)).records]
    whole.load_state_dict(weights(experts))
    expected = [record.loss for record in train(whole, BATCHES, config).records]
    assert losses == pytest.approx(expected, abs=1e-5)


def resume_apart(ranks: Ranks, path: Path) -> str:
    """The last rank sees a folder of its own, in which there is nothing."""
    try:
        run_to(ranks, CASES[1], 3, path / ("elsewhere" if ranks.rank else "state"))
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_ranks_that_would_go_on_from_other_steps_are_told_so(tmp_path):
    run_ranks(2, run_to, CASES[1], 2, tmp_path / "state")
    found = run_ranks(2, resume_apart, tmp_path)
    assert all("other steps on some ranks than on others: 2, None" in each for each in found)


# --- through the front door ------------------------------------------------------------------------------------------


def tune(folder: Path, out: Path, **loading: Any) -> list[float]:
    """Opens a model, trains it, and saves it and the run's state."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **loading)
    text = TokenWindows(TEXT % model.config.vocab_size, batch_size=4, seq_len=12)
    config = TrainingConfig(steps=3, batch_size=4, seq_len=12, learning_rate=1e-3)
    records = train(model, text.batch, config, states=StateFolder(out / "state")).records
    model.save_pretrained(out)
    return [record.loss for record in records]


def tune_on(ranks: Ranks, folder: Path, out: Path, fields: dict[str, Any]) -> list[float]:
    return tune(folder, out, distributed_config=DistributedConfig(**fields))


TUNED = {
    "plain": {"num_experts": 5},
    "tied": {"num_experts": 5, "tie_word_embeddings": True},
    "a single expert": {"num_experts": 1, "num_experts_per_tok": 1},  # half of the ranks have none
}


@pytest.mark.parametrize("changes", TUNED.values(), ids=TUNED)
def test_a_model_is_opened_trained_and_saved_by_all_ranks_as_by_one(tmp_path, changes):
    model = AutoModelForCausalLM.from_config(hub_config("qwen3_moe", **changes))
    randomize(model, seed=3)
    model.save_pretrained(tmp_path / "hub")
    expected = tune(tmp_path / "hub", tmp_path / "one")
    found = run_ranks(4, tune_on, tmp_path / "hub", tmp_path / "four", CASES[3].fields)
    assert all(losses == pytest.approx(expected, abs=1e-5) for losses in found)
    for file in ("model.safetensors", "state/model.safetensors"):
        one, four = (load_file(tmp_path / name / file) for name in ("one", "four"))
        assert one.keys() == four.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(four[name], tensor, atol=1e-5, rtol=1e-5)


def given_another_batch(ranks: Ranks, case: Case) -> str:
    other = TEXT + ranks.rank // (case.ranks - 1)  # the last rank's
    try:
        train(decoder_of(case, ranks), TokenWindows(other, batch_size=7, seq_len=12).batch, SETTINGS)
    except ArgumentError as error:
        return error.message
    return ""


def test_a_step_that_is_not_the_same_on_all_ranks_is_refused_on_all():
    said = run_ranks(3, given_another_batch, Case(3, 4, DISTINCT))
    assert said == ["rank 2 was given another batch than rank 0"] * 3
