"""Quantized while it is read: the bits of the whole weight quantized, whatever the staging, the order of the rows, or
the form in which it lay in the files.
"""

import pytest
import torch

from moebius import ArgumentError, CheckpointError, Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter
from moebius.checkpoint import load
from moebius.checkpoint.loading import LoadOptions, needed_bytes
from moebius.checkpoint.planning import Plan, Target
from moebius.checkpoint.quantizing import Packing, quantized
from moebius.quantization.decoding import quantize
from moebius.quantization.forms import BlockFp8, Int8, Mxfp4, PackedInt4
from tests.checkpoint.folders import planned, write
from tests.quantized_folders import Form, fp8_block, int4_pack, mxfp4

EXPERTS, WIDTH, HIDDEN = 3, 40, 64
FORMS = {
    "int8": Int8(),
    "int4": PackedInt4(),
    "int4-wide": PackedInt4(64, "float32"),
    "fp8": BlockFp8((16, 24)),  # divides neither 40 rows nor 64 inputs
    "fp8-ue8m0": BlockFp8((16, 16), "float8_e8m0fnu"),
    "mxfp4": Mxfp4(),
}
PACK = [
    WeightConverter(
        ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
]
NAME, SHAPE = "experts.gate_up_proj", (EXPERTS, 2 * WIDTH, HIDDEN)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE).to(dtype)


def per_expert(packed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"experts.{e}.{part}_proj.weight": half.contiguous()
        for e in range(EXPERTS)
        for part, half in zip(("gate", "up"), packed[e].chunk(2), strict=True)
    }


def packing(folder, rules, form, stored=None) -> Plan:
    plain = planned(folder, rules, [Target(NAME, SHAPE, "bfloat16")], form=stored)
    return quantized(plain, {NAME: Packing(form, segments=2)})


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def assert_quantized(tensors, form, whole: torch.Tensor) -> None:
    values, scales = quantize(form, whole, segments=2)
    assert same_bits(tensors[NAME], values)
    assert same_bits(tensors[f"{NAME}_scale"], scales)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_per_expert_weights_become_what_the_whole_weight_would(tmp_path, form, dtype):
    whole = weight(dtype)
    plan = packing(write(tmp_path, per_expert(whole), shards=3), PACK, form)
    assert_quantized(load(plan), form, whole)
    assert_quantized(load(plan, options=LoadOptions(loading="sync")), form, whole)


@every_form
@pytest.mark.parametrize("staging", [1, 40 * 64, 1 << 20])
def test_however_little_is_read_and_quantized_at_once(tmp_path, monkeypatch, form, staging):
    for name in ("STAGING_BYTES", "TRANSPOSED_BYTES", "PIECE_ELEMENTS"):
        monkeypatch.setattr(f"moebius.checkpoint.packing.{name}", staging)
    whole = weight()
    assert_quantized(load(packing(write(tmp_path, per_expert(whole)), PACK, form)), form, whole)


@every_form
@pytest.mark.parametrize("staging", [1, 1000, 1 << 20])
def test_transposed_rows_that_alternate_are_put_in_order_first(tmp_path, monkeypatch, form, staging):
    for name in ("STAGING_BYTES", "TRANSPOSED_BYTES"):
        monkeypatch.setattr(f"moebius.checkpoint.packing.{name}", staging)
    whole = weight()
    alternating = torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2)
    rules = [WeightConverter(NAME, NAME, [Transpose(1, 2), Interleave(dim=1, undo=True)])]
    folder = write(tmp_path, {NAME: alternating.transpose(1, 2).contiguous()})
    assert_quantized(load(packing(folder, rules, form)), form, whole)


@every_form
def test_a_weight_under_its_own_name_is_cut_at_the_border_of_gate_and_up(tmp_path, form):
    whole = weight()
    assert_quantized(load(packing(write(tmp_path, {NAME: whole}), [], form)), form, whole)


@pytest.mark.parametrize("form", [Int8(), Mxfp4(), BlockFp8((8, 32))], ids=["int8", "mxfp4", "fp8"])
def test_what_lies_in_another_form_is_decoded_and_quantized_in_one_go(tmp_path, form):
    whole, source = weight(torch.float32), PackedInt4()
    stored = {key: int4_pack(matrix) for key, matrix in per_expert(whole).items()}
    meaning = {key: one.meaning + 0.0 for key, one in stored.items()}  # an integer has no negative zero
    plan = packing(write(tmp_path, keys(stored)), PACK, form, source)
    halves = [[meaning[f"experts.{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(EXPERTS)]
    assert_quantized(load(plan), form, torch.stack([torch.cat(pair) for pair in halves]))


@pytest.mark.parametrize("form", [PackedInt4(), BlockFp8((24, 16))], ids=["int4", "fp8"])
def test_blocks_of_rows_are_decoded_whole_though_others_are_quantized(tmp_path, monkeypatch, form):
    monkeypatch.setattr("moebius.checkpoint.packing.STAGING_BYTES", 7 * HIDDEN * 4)
    whole = mxfp4(weight(torch.float32)).meaning
    alternating = mxfp4(torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2))
    rules = [WeightConverter(f"{NAME}_blocks", NAME, [Interleave(dim=1, undo=True)])]
    folder = write(tmp_path, {NAME + end: tensor for end, tensor in alternating.stored.items()})
    gates_first = torch.cat([alternating.meaning[:, 0::2], alternating.meaning[:, 1::2]], dim=1)
    assert_quantized(load(packing(folder, rules, form, Mxfp4())), form, gates_first)


def keys(stored: dict[str, Form]) -> dict[str, torch.Tensor]:
    return {
        key.removesuffix(".weight") + end: tensor.contiguous()
        for key, form in stored.items()
        for end, tensor in form.stored.items()
    }


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_quantized_to_how_many_bytes_and_progress_adds_up(tmp_path):
    folder = write(tmp_path, per_expert(weight()) | {"norm.weight": torch.ones(8)})
    targets = [Target(NAME, SHAPE, "bfloat16"), Target("norm.weight", (8,), "float32")]
    plan = quantized(planned(folder, PACK, targets), {NAME: Packing(PackedInt4(), 2)})
    packed = 3 * 80 * 64 // 2 + 3 * 80 * 2 * 2
    assert plan.quantized_bytes == packed
    assert plan.target_bytes == packed + 32
    assert "bfloat16 -> int4_pack" in str(plan)
    assert "of which 30.72 kB are quantized to 8.64 kB" in str(plan)
    seen = Seen()
    load(plan, progress=seen)
    assert seen.total == sum(seen.steps) == plan.bytes_to_read == 30720 + 32


def test_what_a_device_needs_beside_the_quantized_model_is_more_on_a_gpu(tmp_path):
    plan = packing(write(tmp_path, per_expert(weight())), PACK, PackedInt4())
    assert needed_bytes(plan, "cpu") == {"cpu": plan.target_bytes + (96 << 20)}
    assert needed_bytes(plan, "cuda:0") == {"cuda:0": plan.target_bytes + (224 << 20)}


class Seen:
    def start(self, total_bytes: int, label: str) -> None:
        self.total, self.steps = total_bytes, []

    def advance(self, nbytes: int) -> None:
        self.steps.append(nbytes)

    def finish(self) -> None:
        pass


def test_a_weight_stored_in_that_form_already_is_refused(tmp_path):
    stored = {key: fp8_block(matrix, (16, 16)) for key, matrix in per_expert(weight(torch.float32)).items()}
    with pytest.raises(ArgumentError, match="quantized already") as caught:
        packing(write(tmp_path, keys(stored)), PACK, BlockFp8(), BlockFp8((16, 16)))
    assert len(caught.value.faults) == 2 * EXPERTS


def test_pieces_that_cut_through_what_shares_a_scale_are_refused(tmp_path):
    rules = [WeightConverter(["left", "right"], NAME, [Concatenate(dim=2)])]
    left, right = (half.contiguous() for half in weight().chunk(2, dim=2))
    with pytest.raises(ArgumentError) as caught:
        packing(write(tmp_path, {"left": left, "right": right}), rules, Int8())
    assert [fault.where for fault in caught.value.faults] == ["left", "right"]


def test_rows_that_do_not_begin_where_a_block_does_are_refused(tmp_path):
    rules = [WeightConverter(["upper", "lower"], NAME, [Concatenate(dim=1, sizes=(10, 70))])]
    whole = weight()
    folder = write(tmp_path, {"upper": whole[:, :10].contiguous(), "lower": whole[:, 10:].contiguous()})
    with pytest.raises(ArgumentError, match="cut through what shares a scale"):
        packing(folder, rules, BlockFp8((16, 16)))
    assert_quantized(load(packing(folder, rules, Int8())), Int8(), whole)


def test_nan_is_found_if_it_is_looked_for(tmp_path):
    whole = weight()
    whole[1, 50, 3] = torch.nan
    plan = packing(write(tmp_path, per_expert(whole)), PACK, Int8())
    load(plan)
    with pytest.raises(CheckpointError, match=r"experts.1.up_proj.weight: NaN"):
        load(plan, check_tensors=True)
