"""Ranks that were given different models, or told to open them differently, find out."""

from pathlib import Path

import pytest
import torch

from moebius import AutoModelForCausalLM
from moebius.distributed.config import DistributedConfig
from moebius.distributed.ranks import Ranks, join
from moebius.distributed.same_weights import check_same_weights
from moebius.distributed.spread import spread_of
from moebius.errors import MoebiusError
from tests.distributed.decoders import parallel_decoder, whole_decoder
from tests.distributed.pool import run_ranks
from tests.model_folders import saved_model


def compare(ranks: Ranks, ep: int, changed: str, where: int) -> str:
    """One number of one tensor is another on one rank, in what is sampled."""
    sets = join(DistributedConfig(ep_size=ep, batch="distinct"), 8, device_type="cpu")
    decoder, _ = parallel_decoder(whole_decoder("gpt_oss"), sets, "distinct")
    if ranks.rank == where:
        tensor = decoder.get_parameter(changed).detach()
        tensor[tuple(size // 2 for size in tensor.shape)] += 1
    try:
        check_same_weights(decoder, spread_of(decoder))
    except MoebiusError as error:
        return str(error)
    return "the same"


ROUTER, EXPERTS = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("changed", "where", "expected"),
    [
        (ROUTER, -1, "the same"),
        (ROUTER, 3, f"{ROUTER}: other weights: on rank 3 than on rank 0"),
        (EXPERTS, 3, f"{EXPERTS}: other weights: on rank 3 than on rank 1"),
    ],
)
def test_what_several_ranks_hold_is_compared(changed, where, expected):
    assert [expected in found or found for found in run_ranks(4, compare, 2, changed, where)] == [True] * 4


def test_experts_that_only_one_rank_holds_are_not_compared():
    assert run_ranks(2, compare, 2, EXPERTS, 1) == ["the same"] * 2


def open_own(ranks: Ranks, folders: list[Path], arguments: list[dict]) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(
            folders[ranks.rank], distributed_config={"enable_expert_parallel": True}, **arguments[ranks.rank]
        )
    except MoebiusError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return [saved_model(tmp_path_factory.mktemp("hub") / "model", "qwen3_moe", seed) for seed in range(2)]


def test_files_that_differ_between_hosts_are_told_of(folders):
    found = run_ranks(2, open_own, folders, [{}, {}])
    said = "CheckpointError: the ranks have read different weights from files of the same names"
    assert all(each.startswith(said) for each in found)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"dtype": "float32"}, "rank 1: dtype: 'float32', rank 0 has None"),
        ({"quantization": "int8"}, "rank 1: quantization: "),
    ],
)
def test_arguments_that_differ_between_ranks_are_told_of(folders, other, expected):
    found = run_ranks(2, open_own, [folders[0]] * 2, [{}, other])
    assert [(each.startswith("ArgumentError: opening a model: ") and expected in each) or each for each in found] == [
        True
    ] * 2


def open_spread(ranks: Ranks, folder: Path, configs: list[dict]) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=configs[ranks.rank])
    except MoebiusError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


@pytest.mark.parametrize("other", [{"batch": "distinct"}, {"ep_size": 1, "fsdp_size": 2}])
def test_configs_that_differ_between_ranks_are_told_of(folders, other):
    own = {"enable_expert_parallel": True}
    found = run_ranks(2, open_spread, folders[0], [own, own | other])
    assert all("distributed_config: ranks were given different settings" in each for each in found)


def wait_for_a_rank(ranks: Ranks) -> str:
    """A second join sets the limit anew; rank 0 waits within a step for one that does not come."""
    again = join(DistributedConfig(ep_size=2, timeout_seconds=0.5), 8, device_type="cpu")
    said = "went on"
    if ranks.rank == 0:
        try:
            torch.distributed.all_reduce(torch.ones(1), group=again.experts)
        except RuntimeError as error:
            said = str(error)
    join(DistributedConfig(ep_size=2, timeout_seconds=60), 8, device_type="cpu")
    return said


def test_a_limit_that_is_given_holds_for_a_process_group_that_was_there():
    assert "500ms" in run_ranks(2, wait_for_a_rank)[0]
