"""A process that holds some experts reads these and nothing of the others, whatever form the files have."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius import ArgumentError, AutoModelForCausalLM, checkpoint, open_checkpoint
from moebius.checkpoint import reading
from moebius.checkpoint.conversion import expand
from moebius.checkpoint.converter import WeightConverter
from moebius.checkpoint.coverage import uncovered
from moebius.checkpoint.loading import LoadOptions
from moebius.checkpoint.operations import Concatenate, Interleave, MergeModulelist, Transpose, swapped
from moebius.checkpoint.owning import owned, within
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.quantizing import Packing, quantized
from moebius.distributed.layout import ExpertLayout
from moebius.quantization.config import QuantizationConfig
from moebius.quantization.forms import Int8, Mxfp4
from tests.checkpoint.folders import numbered, planned, targets, write
from tests.families import tiny_config
from tests.quantized_folders import mxfp4


class Case(NamedTuple):
    """family: of the model.  stored: the form of its files, plain if empty.  dtype, quantization: it is opened with."""

    family: str
    stored: str = ""
    dtype: str = "auto"
    quantization: str | None = None


CASES = {
    "an expert a key": Case("mixtral"),
    "an expert a key, cast": Case("qwen3_moe", dtype="bfloat16"),
    "transposed and interleaved": Case("gpt_oss"),
    "mxfp4, kept": Case("gpt_oss", "mxfp4"),
    "mxfp4, decoded": Case("gpt_oss", "mxfp4", dtype="float32"),
    "fp8, kept": Case("qwen3_moe", "fp8"),
    "fp8, decoded": Case("qwen3_moe", "fp8", dtype="bfloat16"),
    "int4, kept": Case("qwen3_moe", "int4"),
    "quantized to int4": Case("qwen3_moe", quantization="int4"),
    "quantized to int8": Case("qwen3_moe", quantization="int8"),
    "transposed, quantized to int8": Case("gpt_oss", quantization="int8"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[Case], Path]:
    """case -> its files, in float32 but for what is quantized; each made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(case: Case) -> Path:
        family, form = key = case.family, case.stored
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{form}")
            if form:
                plain = get(Case(family))
                AutoModelForCausalLM.from_pretrained(plain, quantization=form).save_pretrained(folder)
            else:
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(tiny_config(family))
                for tensor in model.state_dict().values():
                    tensor.normal_()
                model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return get


def plan_of(folder: Path, case: Case) -> Plan:
    wanted = QuantizationConfig(case.quantization) if case.quantization else None
    return open_checkpoint(folder, dtype=case.dtype, quantization=wanted).plan


def boxes_of(plan: Plan, rank: int, ranks: int) -> dict[str, range]:
    names = [name for name in plan.targets if ".experts." in name]
    return {name: ExpertLayout(plan.targets[name].shape[0], ranks).experts_of(rank) for name in names}


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def spoil_foreign_experts(plan: Plan, held: range, copy: Path) -> None:
    """Every byte of experts that are not held becomes 0xff in the folder `copy`: NaN in floats, wrong elsewhere."""
    for info in plan.files.tensors.values():
        if ".experts" not in info.name or info.name.endswith("_shape"):
            continue
        with (copy / info.file).open("r+b") as file:
            for start, nbytes in foreign(info, held):
                file.seek(info.offset + start)
                file.write(b"\xff" * nbytes)


def foreign(info, held: range) -> Iterator[tuple[int, int]]:
    """(start, nbytes) within a stored tensor: of one expert by its key's number, of all by its first axis."""
    if number := re.search(r"\.experts\.(\d+)\.", info.name):
        if int(number[1]) not in held:
            yield 0, info.nbytes
        return
    each = info.nbytes // info.shape[0]
    yield from ((expert * each, each) for expert in range(info.shape[0]) if expert not in held)


@every_case
@pytest.mark.parametrize("loading", ["sync", "async"])
def test_a_rank_loads_its_experts_though_all_others_are_spoiled(folders, tmp_path, case, loading):
    source, ranks = folders(case), 3  # 4 and 8 experts: neither is divided by it
    whole = checkpoint.load(plan_of(source, case), options=LoadOptions(mapping="never"))
    for rank in range(ranks):
        copy = tmp_path / str(rank)
        copy.mkdir()
        for path in source.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        plan = plan_of(copy, case)
        boxes = boxes_of(plan, rank, ranks)
        assert boxes
        spoil_foreign_experts(plan, next(iter(boxes.values())), copy)
        loaded = checkpoint.load(owned(plan_of(copy, case), boxes), options=LoadOptions(loading), check_tensors=True)
        assert loaded.keys() == whole.keys()
        for name, tensor in whole.items():
            mine = tensor[boxes[name].start : boxes[name].stop] if name in boxes else tensor
            assert bits(loaded[name]) == bits(mine), name


@every_case
def test_as_many_bytes_are_read_as_the_plan_says_and_all_ranks_together_read_every_expert_once(
    folders, monkeypatch, case
):
    if case.family == "gpt_oss" and case.quantization:
        pytest.skip("transposed rows: every slab reads all of its matrix")
    read, read_there = [0], reading.os.preadv

    def counted(*arguments):
        read[0] += (count := read_there(*arguments))
        return count

    monkeypatch.setattr(reading.os, "preadv", counted)
    plan, ranks = plan_of(folders(case), case), 3
    total = 0
    for rank in range(ranks):
        mine, read[0] = owned(plan, boxes_of(plan, rank, ranks)), 0
        checkpoint.load(mine, options=LoadOptions("sync", "never"))
        assert read[0] == mine.bytes_to_read
        total += read[0]
    alone = owned(plan, {name: range(0) for name in boxes_of(plan, 0, 1)})
    assert total == plan.bytes_to_read + (ranks - 1) * alone.bytes_to_read


# --- every layout, any number of experts and ranks ---

LAYOUTS = {
    "a key each": WeightConverter(["e.*.gate", "e.*.up"], "experts", [MergeModulelist(0), Concatenate(1)]),
    "stacked on the second axis": WeightConverter("e.*.w", "experts", [MergeModulelist(1), Transpose(0, 1)]),
    "as they are": WeightConverter("packed", "experts", [Transpose(0, 0)]),
    "transposed": WeightConverter("packed", "experts", [Transpose(1, 2)]),
    "experts last": WeightConverter("packed", "experts", [Transpose(0, 2)]),
    "transposed and interleaved": WeightConverter("packed", "experts", [Transpose(1, 2), Interleave(dim=1, undo=True)]),
    "experts interleaved": WeightConverter("packed", "experts", [Interleave(dim=0, undo=True)]),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 4), st.integers(1, 5))
def test_all_ranks_take_every_stored_element_once_and_fill_every_element_of_theirs_once(layout, half, ranks):
    experts, rule = 2 * half, LAYOUTS[layout]
    match = rule.match_target("experts")
    sources = [s for group in expand(rule, match, {"experts": (experts, 6, 4)}, {}).sources for s in group]
    taken = defaultdict(list)
    for rank in range(ranks):
        box = ExpertLayout(experts, ranks).experts_of(rank)
        parts = {source.key: within(source.layout.parts, {"experts": box}) for source in sources}
        assert not uncovered({"experts": (len(box), 6, 4)}, (part for mine in parts.values() for part in mine))
        for key, mine in parts.items():
            taken[key] += [swapped(part)._replace(name=key) for part in mine]
    stored = {source.key: source.layout.shape for source in sources}
    assert not uncovered(stored, (part for mine in taken.values() for part in mine))


def test_rows_of_a_matrix_that_is_decoded_are_read_without_the_blocks_below_and_above(tmp_path, monkeypatch):
    monkeypatch.setattr("moebius.checkpoint.decoding.STAGING_BYTES", 64)
    form = mxfp4(torch.randn(2, 40, 64))
    folder = write(tmp_path, {f"w{end}": tensor for end, tensor in form.stored.items()})
    rules = [WeightConverter("w_blocks", "w", [Transpose(0, 1)])]
    plan = owned(planned(folder, rules, targets(w=(40, 2, 64)), form=Mxfp4()), {"w": range(7, 29)})
    assert torch.equal(checkpoint.load(plan)["w"], form.meaning.transpose(0, 1)[7:29])
    assert plan.bytes_to_read == sum(tensor.nbytes for tensor in form.stored.values()) * 22 // 40


# --- what the plan says ---


def expert_files(folder: Path, experts: int = 5) -> Plan:
    tensors = {f"experts.{e}.w": numbered(4, 8, start=e * 32) for e in range(experts)} | {"norm": numbered(6)}
    rule = WeightConverter("experts.*.w", "experts.packed", [MergeModulelist(0)])
    return planned(write(folder, tensors), [rule], targets(**{"experts.packed": (experts, 4, 8), "norm": (6,)}))


def test_a_narrowed_plan_describes_itself(tmp_path):
    plan = owned(expert_files(tmp_path), {"experts.packed": range(1, 3)})
    assert plan.targets["experts.packed"].shape == (2, 4, 8)
    assert plan.bytes_to_read == plan.target_bytes == 2 * 128 + 24
    assert plan.peak_bytes == plan.target_bytes + (1 << 20)
    report = plan.to_json()
    assert [(row["tensors"], row["nbytes"]) for row in report["rows"]] == [(2, 256), (1, 24)]
    assert report["tensors"] == 3
    assert "2       256 B  float32  experts.*.w -> experts.packed" in str(plan)


def test_of_a_tensor_that_holds_all_experts_the_rows_that_are_read_count(tmp_path):
    plan = planned(write(tmp_path, {"w": numbered(4, 3)}), [], targets(w=(4, 3)))
    (row,) = owned(plan, {"w": range(1, 2)}).to_json()["rows"]
    assert (row["tensors"], row["nbytes"]) == (1, 12)


def test_a_rank_may_have_no_expert(tmp_path):
    plan = owned(expert_files(tmp_path), {"experts.packed": range(5, 5)})
    loaded = checkpoint.load(plan)
    assert loaded["experts.packed"].shape == (0, 4, 8)
    assert torch.equal(loaded["norm"], numbered(6))
    assert plan.bytes_to_read == 24
    assert len(plan.to_json()["rows"]) == 1


def test_boxes_that_are_no_run_of_a_target_are_refused_all_at_once(tmp_path):
    plan = expert_files(tmp_path)
    with pytest.raises(ArgumentError) as caught:
        owned(plan, {"experts.packed": range(0, 4, 2), "norm": range(3, 7), "experts.w": range(1)})
    assert [(fault.where, fault.what) for fault in caught.value.faults] == [
        ("experts.packed", "no run of its first axis"),
        ("norm", "no run of its first axis"),
        ("experts.w", "unknown"),
    ]


def test_values_and_scales_stay_together(tmp_path):
    plan = quantized(expert_files(tmp_path), {"experts.packed": Packing(Int8())})
    with pytest.raises(ArgumentError, match=r"values in range\(0, 2\), scales in None"):
        owned(plan, {"experts.packed": range(2)})
    assert owned(plan, {"experts.packed": range(2), "experts.packed_scale": range(2)}).packs[0].shape == (2, 4, 8)


def test_a_matrix_whose_rows_share_scales_is_not_cut(tmp_path):
    plan = quantized(planned(write(tmp_path, {"w": numbered(4, 8)}), [], targets(w=(4, 8))), {"w": Packing(Int8())})
    with pytest.raises(ArgumentError, match="rows share scales"):
        owned(plan, {"w": range(2), "w_scale": range(2)})


def test_a_tied_weight_that_is_stored_twice_is_not_cut(tmp_path):
    folder = write(tmp_path, {"embed": numbered(4, 2), "head": numbered(4, 2)})
    plan = planned(folder, [], [Target("embed", (4, 2), "float32", aliases=("head",))])
    with pytest.raises(ArgumentError, match="tied and stored twice"):
        owned(plan, {"embed": range(2)})


# --- what the kernel counts ---


def bytes_the_process_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
@pytest.mark.parametrize("stored", ["an expert a key", "mxfp4, decoded"])
def test_of_64_megabytes_no_more_is_read_than_the_share(tmp_path, stored):
    experts, ranks = 6, 4
    folder, plan = large_per_expert(tmp_path) if stored == "an expert a key" else large_mxfp4(tmp_path)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 64 << 20
    dense = plan.targets["dense"].nbytes
    for rank in (0, ranks - 1):
        mine = owned(plan, {"experts": ExpertLayout(experts, ranks).experts_of(rank)})
        before = bytes_the_process_read()
        checkpoint.load(mine, options=LoadOptions(mapping="never"))
        share = (plan.bytes_to_read - dense) * -(-experts // ranks) // experts
        assert mine.bytes_to_read <= dense + share
        assert bytes_the_process_read() - before <= 1.01 * mine.bytes_to_read


def large_per_expert(folder: Path) -> tuple[Path, Plan]:
    tensors = {f"e.{e}.w": torch.zeros(2048, 2560, dtype=torch.bfloat16) for e in range(6)}
    tensors |= {"dense": torch.zeros(2048, 1024, dtype=torch.bfloat16)}
    wanted = [Target("experts", (6, 2048, 2560), "bfloat16"), Target("dense", (2048, 1024), "bfloat16")]
    rule = WeightConverter("e.*.w", "experts", [MergeModulelist(0)])
    return write(folder, tensors, shards=2), planned(folder, [rule], wanted)


def large_mxfp4(folder: Path) -> tuple[Path, Plan]:
    tensors = {
        "w_blocks": torch.zeros(6, 4096, 176, 16, dtype=torch.uint8),
        "dense": torch.zeros(1024, dtype=torch.uint8),
    }
    tensors |= {"w_scales": torch.full((6, 4096, 176), 127, dtype=torch.uint8)}
    wanted = [Target("experts", (6, 4096, 5632), "bfloat16"), Target("dense", (1024,), "uint8")]
    rule = WeightConverter("w_blocks", "experts", [Transpose(0, 0)])
    return write(folder, tensors), planned(folder, [rule], wanted, form=Mxfp4())
