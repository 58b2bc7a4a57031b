"""Experts over ranks, through the front door: the model is the one of a single process, on any number of ranks.

N ranks; functions that begin with `ranks` run on each of them.
"""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius import ArgumentError, AutoModelForCausalLM, CheckpointError, DistributedConfig, MoebiusError
from moebius.arguments import distributed_config_of
from moebius.checkpoint import hub
from moebius.distributed.ranks import Ranks
from moebius.on_ranks import located
from tests.distributed.pool import run_ranks
from tests.families import tiny_config
from tests.model_folders import ids_for, logits, saved_model, tensors_of

ENABLED: dict[str, Any] = {"enable_expert_parallel": True}
DISTINCT = {**ENABLED, "batch": "distinct"}
FIVE = {"num_experts": 5}  # which neither 2 nor 3 ranks can share evenly
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
MXFP4 = {"form": "mxfp4", "parts": ("experts",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a tiny model of random weights, by its family and the changes to its config."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        name = f"{family}-{changes}"
        if name not in made:
            place = tmp_path_factory.mktemp("hub") / family
            made[name] = saved_model(place, family, seed=3, max_shard_size="60kB", **changes)
        return made[name]

    return folder


def opened(folder: Path, config: Any = ENABLED, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options)


# --- one model -------------------------------------------------------------------------------------------------------


def found_on(ranks: Ranks, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    model = opened(folder, **options)
    ids = ids_for(model)
    return {
        "logits": logits(model, ids),
        "tokens": model.generate(ids[:1], **GREEDY),
        "experts": [each.shape[0] for name, each in model.named_parameters() if name.endswith("gate_up_proj")],
        "read": model.load_report.plan.bytes_to_read,
        "planned": model.plan.bytes_to_read,
    }


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("qwen3_moe", FIVE, {}),
        ("gpt_oss", {}, {"dtype": "auto"}),
        ("deepseek_v3", {}, {}),
        ("mixtral", {"num_local_experts": 2}, {}),  # fewer than three ranks
        ("qwen3_moe", FIVE, {"quantization": "int8"}),
    ],
)
def test_logits_and_tokens_are_those_of_one_process(folders, ranks, family, changes, options):
    folder = folders(family, **changes)
    one = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = ids_for(one)
    for found in run_ranks(ranks, found_on, folder, options):
        torch.testing.assert_close(found["logits"], logits(one, ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(found["tokens"], one.generate(ids[:1], **GREEDY))


def test_each_rank_reads_and_holds_its_own_experts_alone(folders):
    folder = folders("qwen3_moe", **FIVE)
    first, second = run_ranks(2, found_on, folder, {})
    assert [set(first["experts"]), set(second["experts"])] == [{3}, {2}]
    experts = sum(len(each) for key, each in tensors_of(folder).items() if ".experts." in key)
    rest = first["planned"] - experts
    assert [first["read"], second["read"]] == [rest + experts * 3 // 5, rest + experts * 2 // 5]
    assert first["planned"] == second["planned"] == sum(map(len, tensors_of(folder).values()))


def test_what_is_stored_quantized_stays_so(folders, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folders("gpt_oss"), quantization_config=MXFP4, dtype="bfloat16")
    plain.save_pretrained(tmp_path / "mxfp4")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "mxfp4")
    assert one.source.held
    for found in run_ranks(3, found_on, tmp_path / "mxfp4", {}):
        assert torch.equal(found["tokens"], one.generate(ids_for(one)[:1], **GREEDY))
        torch.testing.assert_close(found["logits"], logits(one, ids_for(one)), atol=0.2, rtol=0.02)


def test_without_torchrun_it_is_a_job_of_one_rank(folders):
    folder = folders("qwen3_moe", **FIVE)
    (found,) = run_ranks(1, found_on, folder, {})
    one = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(found["logits"], logits(one, ids_for(one)))


def made_on(ranks: Ranks, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return AutoModelForCausalLM.from_config(config, distributed_config=ENABLED, generator=generator).state_dict()


def test_a_new_model_is_the_one_that_a_single_process_would_make():
    config = tiny_config("gpt_oss")
    one = AutoModelForCausalLM.from_config(config, generator=torch.Generator().manual_seed(7)).state_dict()
    found = run_ranks(3, made_on, config)
    for name, whole in one.items():
        parts = [each[name] for each in found] if ".experts." in name else [found[1][name]]
        assert torch.equal(torch.cat(parts), whole), name


def made_without_generator_on(ranks: Ranks, config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(ranks.rank)  # as in processes that torchrun starts, no two begin alike
    model = AutoModelForCausalLM.from_config(config, distributed_config=ENABLED)
    return logits(model, ids_for(model))


def test_a_new_model_is_the_same_on_all_ranks_without_a_generator_too():
    first, second = run_ranks(2, made_without_generator_on, tiny_config("qwen3_moe"))
    assert torch.equal(first, second)


# --- saving ----------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved_on(ranks: Ranks, source: Path, out: Path, options: dict[str, Any]) -> None:
    opened(source, **options).save_pretrained(out, max_shard_size="60kB")


def test_saved_on_two_ranks_and_on_three_it_is_what_it_was(folders, tmp_path):
    start = folders("qwen3_moe", **FIVE)
    run_ranks(2, saved_on, start, tmp_path / "two", {})
    run_ranks(3, saved_on, tmp_path / "two", tmp_path / "three", {})
    AutoModelForCausalLM.from_pretrained(tmp_path / "three").save_pretrained(tmp_path / "one")
    assert files_of(start) == files_of(tmp_path / "two") == files_of(tmp_path / "three") == files_of(tmp_path / "one")


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_what_changes_while_it_is_read_is_saved_as_by_one_process(folders, tmp_path, options):
    start = folders("qwen3_moe", **FIVE)
    AutoModelForCausalLM.from_pretrained(start, **options).save_pretrained(tmp_path / "one", max_shard_size="60kB")
    run_ranks(2, saved_on, start, tmp_path / "two", options)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def sharded_on(ranks: Ranks, source: Path, out: Path) -> float:
    model, one = opened(source, {**DISTINCT, "fsdp_size": 2}), AutoModelForCausalLM.from_pretrained(source)
    ids = ids_for(model, batch=1 + ranks.rank, tokens=5)
    model.generate(ids, **GREEDY)
    model.save_pretrained(out, max_shard_size="60kB")
    return (logits(model, ids) - logits(one, ids)).abs().max().item()


def test_sharded_by_fsdp_too_it_computes_and_is_saved_as_by_one_process(folders, tmp_path):
    start = folders("qwen3_moe", **FIVE)
    assert max(run_ranks(2, sharded_on, start, tmp_path / "two")) < 1e-5
    assert files_of(tmp_path / "two") == files_of(start)


# --- errors ----------------------------------------------------------------------------------------------------------


def error_on(ranks: Ranks, folders: list[Path], options: dict[str, Any]) -> str:
    try:
        opened(folders[min(ranks.rank, len(folders) - 1)], **options)
    except MoebiusError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_file_that_one_rank_finds_truncated_is_every_ranks_error(folders, tmp_path):
    whole, broken = folders("qwen3_moe", **FIVE), tmp_path / "broken"
    broken.mkdir()
    for file in whole.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = min(broken.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 8)
    first, second = run_ranks(2, error_on, [whole, broken], {})
    assert first.startswith("CheckpointError: rank 1: ")
    assert "truncated" in first
    assert second == first.replace("rank 1: ", "")
    assert CheckpointError.__name__ in second


def test_what_one_rank_misses_is_every_ranks_error_where_fsdp_makes_groups_too(folders, tmp_path):
    whole, broken = folders("qwen3_moe", **FIVE), tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(broken, layout="published")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = {"ep_size": 2, "fsdp_size": 2, "batch": "distinct"}
    first, second, *others = run_ranks(4, error_on, [whole, broken, whole], {"config": config})
    assert second.startswith("CheckpointError: 1 fault")
    assert all(
        "CheckpointError: rank 1: " in each and "model.norm.weight: missing" in each for each in (first, *others)
    )


def test_ranks_that_find_different_models_are_told_so(folders):
    found = run_ranks(2, error_on, [folders("qwen3_moe"), folders("qwen3_moe", **FIVE)], {})
    assert all("ConfigError: config.json on rank 1 differs from that on rank 0" in each for each in found)


def test_a_dense_model_has_no_experts_to_spread(folders):
    found = run_ranks(2, error_on, [folders("qwen2")], {})
    assert all("has no experts to spread" in each for each in found)


@pytest.mark.parametrize("option", [{"device_map": "meta"}, {"max_memory": {"cpu": "1GB"}}], ids=str)
def test_devices_are_the_ranks_own(folders, option):
    found = run_ranks(2, error_on, [folders("qwen3_moe")], option)
    assert all(f"{next(iter(option))}=" in each and "leave it out" in each for each in found)


def fetched_on(ranks: Ranks, folder: Path, fails: bool) -> list[float] | str:
    """When each of this rank's visits to the hub ended; rank 0's first one takes a while."""
    ends: list[float] = []

    def download(*_: Any) -> Path:
        time.sleep(0 if ends or ranks.rank else 0.3)
        if fails:
            raise CheckpointError("no such model")
        ends.append(time.monotonic())
        return folder

    with mock.patch.object(hub, "_download", download):
        try:
            assert located("some/model", ranks) == folder
        except CheckpointError as error:
            return str(error)
    return ends


def test_the_first_rank_of_a_host_fetches_what_the_others_then_find(folders):
    first, second = run_ranks(2, fetched_on, folders("qwen3_moe"), False)
    assert [len(first), len(second)] == [2, 1]
    assert first[0] < second[0]


def test_what_cannot_be_fetched_is_every_ranks_error(folders):
    assert run_ranks(2, fetched_on, folders("qwen3_moe"), True) == ["no such model", "rank 0: no such model"]


# --- what distributed_config takes -----------------------------------------------------------------------------------


def theirs(**fields: Any) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig as Theirs

    return Theirs(**fields)


@pytest.mark.filterwarnings("ignore:.*enable_expert_parallel:FutureWarning")
def test_transformers_spellings_are_taken():
    assert distributed_config_of(theirs(enable_expert_parallel=True)) == DistributedConfig(True, dp_replicate_size=1)
    assert distributed_config_of(theirs(fsdp_size=4, ep_size=2)) == DistributedConfig(
        True, ep_size=2, fsdp_size=4, dp_replicate_size=1, batch="distinct"
    )
    alone = theirs(tp_size=2, enable_expert_parallel=True)
    assert distributed_config_of(alone) == DistributedConfig(True, ep_size=2, dp_replicate_size=1)
    assert distributed_config_of(theirs()) == DistributedConfig(dp_replicate_size=1)
    assert distributed_config_of({"ep_size": 2, "tp_size": None}) == DistributedConfig(ep_size=2)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"tp_size": 2}, "tp_size=2: not supported: tensor parallelism"),
        ({"pp_size": 2, "ep_size": 2}, "pp_size=2"),
        ({"ep_plan": {"layers": "x"}}, "ep_plan"),
        ({"ep_sise": 2}, "did you mean ep_size"),
        ({"ep_size": 0}, "ep_size: too small"),
        (2, "int is not read"),
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused_by_name(config, names):
    with pytest.raises(ArgumentError, match=names):
        distributed_config_of(config)


@pytest.mark.parametrize("field", [{"batch": "distinct"}, {"exchange": "all_reduce"}], ids=str)
def test_how_to_spread_without_that_is_refused(folders, field):
    with pytest.raises(ArgumentError, match="without effect") as refused:
        opened(folders("qwen3_moe"), field)
    assert "enable_expert_parallel=True" in str(refused.value)


def test_a_config_that_asks_for_nothing_spreads_nothing(folders):
    assert opened(folders("qwen3_moe"), DistributedConfig()).ranks is None
