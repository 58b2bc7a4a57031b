"""Quantized weights in plans and loads: values and scales belong together, and are decoded or kept; heads of keys are
renamed; extras are skipped by rule.
"""

import pytest
import torch

from moebius import (
    ArgumentError,
    CheckpointError,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightSkip,
    checkpoint,
)
from moebius.checkpoint.converter import PrefixRenaming
from moebius.checkpoint.planning import Target
from moebius.quantization.forms import BlockFp8, Mxfp4, PackedInt4
from tests.checkpoint.folders import numbered, planned, read, targets, write
from tests.quantized_folders import Form, fp8_block, int4_pack, mxfp4

BLOCK = BlockFp8(block=(16, 16))
EXPERTS, WIDTH, HIDDEN = 3, 40, 64
PACK = [
    WeightConverter(
        ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
]
PACKED = {"experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN)}


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def stored(form: Form, stem: str) -> dict[str, torch.Tensor]:
    return {stem + end: tensor for end, tensor in form.stored.items()}


def gate_and_up(encode) -> dict[str, Form]:
    return {
        f"experts.{e}.{part}_proj": encode(weight(WIDTH, HIDDEN)) for e in range(EXPERTS) for part in ("gate", "up")
    }


def packed(forms: dict[str, Form]) -> torch.Tensor:
    parts = [[forms[f"experts.{e}.{part}_proj"].meaning for part in ("gate", "up")] for e in range(EXPERTS)]
    return torch.stack([torch.cat(halves) for halves in parts])


def faults_of(folder, rules, wanted, **options) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        planned(folder, rules, wanted, **options)
    return [str(fault) for fault in caught.value.faults]


# --- decoded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "form"),
    [
        (lambda matrix: fp8_block(matrix, BLOCK.block), BLOCK),
        (lambda matrix: fp8_block(matrix, BLOCK.block, torch.float8_e8m0fnu), BLOCK),
        (int4_pack, PackedInt4()),
    ],
    ids=["fp8", "fp8-ue8m0", "int4"],
)
def test_per_expert_weights_are_decoded_into_the_packed_parameter(tmp_path, encode, form):
    forms = gate_and_up(encode)
    folder = write(tmp_path, {key: t for stem, one in forms.items() for key, t in stored(one, stem).items()}, shards=3)
    plan = planned(folder, PACK, targets(**PACKED), form=form)
    assert set(plan.encoded) == set(PACKED)
    assert torch.equal(checkpoint.load(plan)["experts.gate_up_proj"], packed(forms))


def test_decoding_casts_once_to_the_targets_dtype(tmp_path):
    form = fp8_block(weight(WIDTH, HIDDEN), BLOCK.block)
    plan = planned(
        write(tmp_path, stored(form, "q_proj")), [], [Target("q_proj.weight", (WIDTH, HIDDEN), "bfloat16")], form=BLOCK
    )
    assert torch.equal(checkpoint.load(plan)["q_proj.weight"], form.meaning.bfloat16())


def test_rows_that_alternate_are_put_in_order_while_they_are_decoded(tmp_path):
    form = mxfp4(weight(EXPERTS, 2 * WIDTH, HIDDEN))
    rules = [WeightConverter("experts.gate_up_proj_blocks", "experts.gate_up_proj", [Interleave(dim=1, undo=True)])]
    plan = planned(write(tmp_path, stored(form, "experts.gate_up_proj")), rules, targets(**PACKED), form=Mxfp4())
    expected = torch.cat([form.meaning[:, 0::2], form.meaning[:, 1::2]], dim=1)
    assert torch.equal(checkpoint.load(plan)["experts.gate_up_proj"], expected)


def test_a_matrix_larger_than_the_staging_is_decoded_in_pieces_of_whole_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("moebius.checkpoint.decoding.STAGING_BYTES", 20 * 200)  # 20 rows: one block of 16
    form = fp8_block(weight(100, 200), BLOCK.block)
    plan = planned(write(tmp_path, stored(form, "q_proj")), [], targets(**{"q_proj.weight": (100, 200)}), form=BLOCK)
    assert torch.equal(checkpoint.load(plan)["q_proj.weight"], form.meaning)


def test_576_rows_have_five_scales(tmp_path):
    form = fp8_block(weight(576, 192))
    assert form.stored[".weight_scale_inv"].shape == (5, 2)
    plan = planned(write(tmp_path, stored(form, "kv")), [], targets(**{"kv.weight": (576, 192)}), form=BlockFp8())
    assert torch.equal(checkpoint.load(plan)["kv.weight"], form.meaning)


def test_what_is_not_quantized_is_read_as_it_is(tmp_path):
    form, plain = fp8_block(weight(32, 32), BLOCK.block), weight(8, 8)
    folder = write(tmp_path, stored(form, "q_proj") | {"lm_head.weight": plain})
    plan = planned(folder, [], targets(**{"q_proj.weight": (32, 32), "lm_head.weight": (8, 8)}), form=BLOCK)
    assert set(plan.encoded) == {"q_proj.weight"}
    assert torch.equal(checkpoint.load(plan)["lm_head.weight"], plain)


# --- kept ----------------------------------------------------------------------------------------------------------


def test_kept_values_and_scales_go_where_the_rules_of_the_weights_send_them_and_back(tmp_path):
    forms = gate_and_up(lambda matrix: fp8_block(matrix, BLOCK.block))
    folder = write(tmp_path / "in", {key: t for stem, one in forms.items() for key, t in stored(one, stem).items()}, 2)
    wanted = [
        Target("experts.gate_up_proj", (EXPERTS, 2 * WIDTH, HIDDEN), "float8_e4m3fn"),
        Target("experts.gate_up_proj_scale", (EXPERTS, 6, 4), "float32"),
    ]
    plan = planned(folder, PACK, wanted, form=BLOCK, keep=True)
    assert not plan.encoded
    tensors = checkpoint.load(plan)
    halves = [forms[f"experts.1.{part}_proj"].stored for part in ("gate", "up")]
    assert torch.equal(tensors["experts.gate_up_proj_scale"][1], torch.cat([h[".weight_scale_inv"] for h in halves]))
    assert torch.equal(tensors["experts.gate_up_proj"][1].float(), torch.cat([h[".weight"] for h in halves]).float())
    checkpoint.save(plan, tensors, tmp_path / "out")
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_kept_shape_is_compared_and_carried_over(tmp_path):
    form = int4_pack(weight(WIDTH, HIDDEN))
    folder = write(tmp_path / "in", stored(form, "q_proj"))
    wanted = [
        Target("q_proj.weight", (WIDTH, HIDDEN // 8), "int32"),
        Target("q_proj.weight_scale", (WIDTH, HIDDEN // 32), "bfloat16"),
    ]
    plan = planned(folder, [], wanted, form=PackedInt4(), keep=True)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- refused -------------------------------------------------------------------------------------------------------


def test_a_stored_shape_that_is_not_the_weights_is_refused_at_loading(tmp_path):
    form = int4_pack(weight(WIDTH, HIDDEN))
    form.stored[".weight_shape"][1] = HIDDEN + 8
    plan = planned(write(tmp_path, stored(form, "q")), [], targets(**{"q.weight": (WIDTH, HIDDEN)}), form=PackedInt4())
    with pytest.raises(CheckpointError, match=r"q.weight_shape: wrong shape: .*\[40, 72\], expected \[40, 64\]"):
        checkpoint.load(plan)


def test_scales_without_values_are_a_fault(tmp_path):
    tensors = stored(fp8_block(weight(32, 32), BLOCK.block), "q")
    del tensors["q.weight"]
    faults = faults_of(write(tmp_path, tensors), [], targets(**{"q.weight": (32, 32)}), form=BLOCK)
    assert any(fault.startswith("q.weight_scale_inv: scales without values") for fault in faults)


def test_values_without_scales_are_a_fault(tmp_path):
    tensors = stored(fp8_block(weight(32, 32), BLOCK.block), "q")
    del tensors["q.weight_scale_inv"]
    faults = faults_of(write(tmp_path, tensors), [], targets(**{"q.weight": (32, 32)}), form=BLOCK)
    assert faults == [
        "q.weight: dtype: found float8_e4m3fn in model.safetensors, expected float32; "
        "its scales, q.weight_scale_inv, are not in the files"
    ]


def test_scales_of_another_grid_are_a_fault(tmp_path):
    tensors = stored(fp8_block(weight(32, 32), (16, 8)), "q")
    faults = faults_of(write(tmp_path, tensors), [], targets(**{"q.weight": (32, 32)}), form=BLOCK)
    assert faults == [
        "q.weight_scale_inv: shape: found [2, 4] in model.safetensors, expected [2, 2], for the blocks of [16, 16] "
        "of config.json"
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float64])
def test_scales_that_could_only_be_guessed_at_are_a_fault(tmp_path, dtype):
    tensors = stored(fp8_block(weight(32, 32), BLOCK.block), "q")
    tensors["q.weight_scale_inv"] = torch.full((2, 2), 127).to(dtype)  # as uint8, e8m0's 1.0 by another name?
    faults = faults_of(write(tmp_path, tensors), [], targets(**{"q.weight": (32, 32)}), form=BLOCK)
    assert "expected float32 or bfloat16 or float16 or float8_e8m0fnu" in faults[0]


@pytest.mark.parametrize("encode", [lambda matrix: fp8_block(matrix, BLOCK.block), int4_pack], ids=["fp8", "int4"])
def test_quantized_files_without_a_word_of_it_in_the_config_are_one_fault(tmp_path, encode):
    tensors = {key: t for stem, one in gate_and_up(encode).items() for key, t in stored(one, stem).items()}
    (fault,) = faults_of(write(tmp_path, tensors), PACK, targets(**PACKED))
    assert fault.startswith("config.json: no quantization_config: the files hold quantized weights, such as experts.0")


def test_one_plain_expert_among_quantized_ones_is_a_fault(tmp_path):
    forms = gate_and_up(lambda matrix: fp8_block(matrix, BLOCK.block))
    tensors = {key: t for stem, one in forms.items() for key, t in stored(one, stem).items()}
    del tensors["experts.1.up_proj.weight_scale_inv"]
    tensors["experts.1.up_proj.weight"] = weight(WIDTH, HIDDEN)
    faults = faults_of(write(tmp_path, tensors), PACK, targets(**PACKED), form=BLOCK)
    assert len(faults) == 1
    assert faults[0].startswith("experts.1.up_proj.weight: dtype: found float32")


def test_a_target_that_is_no_float_cannot_be_decoded_to(tmp_path):
    tensors = stored(fp8_block(weight(32, 32), BLOCK.block), "q")
    faults = faults_of(write(tmp_path, tensors), [], [Target("q.weight", (32, 32), "int8")], form=BLOCK)
    assert faults[0].startswith("q.weight: dtype: found fp8_block")


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_head_of_keys_is_renamed_before_all_rules_and_back_when_saved(tmp_path):
    tensors = {f"language_model.model.layers.0.{name}": numbered(4, 4) for name in ("old.weight", "norm.weight")}
    rules = [PrefixRenaming("language_model.model", "model"), WeightRenaming("old.weight", "new.weight")]
    folder = write(tmp_path / "in", tensors)
    wanted = targets(**{"model.layers.0.new.weight": (4, 4), "model.layers.0.norm.weight": (4, 4)})
    plan = planned(folder, rules, wanted)
    checkpoint.save(plan, checkpoint.load(plan), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_faults_spell_keys_as_the_files_do(tmp_path):
    folder = write(tmp_path, {"language_model.model.a.weight": numbered(4)})
    rules = [PrefixRenaming("language_model.model", "model")]
    faults = faults_of(folder, rules, targets(**{"model.a.weight": (5,), "model.b.weight": (4,)}))
    assert [fault.split(": ")[:2] for fault in faults] == [
        ["language_model.model.a.weight", "shape"],
        ["language_model.model.b.weight", "missing"],
    ]


def test_two_keys_for_one_name_are_a_fault(tmp_path):
    folder = write(tmp_path, {"text.a.weight": numbered(4), "a.weight": numbered(4)})
    faults = faults_of(folder, [PrefixRenaming("text.a", "a")], targets(**{"a.weight": (4,)}))
    assert any("two keys for one name" in fault for fault in faults)


def test_everything_below_a_head_is_skipped_with_its_reason(tmp_path):
    tensors = {"a.weight": numbered(4), "vision_tower.blocks.3.w": numbered(2), "x.vision_tower.w": numbered(2)}
    rules = [WeightSkip("vision_tower.**", "vision tower")]
    faults = faults_of(write(tmp_path / "1", tensors), rules, targets(**{"a.weight": (4,)}))
    assert [fault.split(": ")[:2] for fault in faults] == [["x.vision_tower.w", "unexpected"]]
    del tensors["x.vision_tower.w"]
    plan = planned(write(tmp_path / "2", tensors), rules, targets(**{"a.weight": (4,)}))
    assert [(info.name, reason) for info, reason in plan.skipped] == [("vision_tower.blocks.3.w", "vision tower")]


def test_layers_from_an_index_on_are_skipped_and_quantized_ones_too(tmp_path):
    tensors = {"model.layers.1.norm.weight": numbered(4), "model.layers.2.norm.weight": numbered(4)}
    tensors |= stored(fp8_block(weight(32, 32), BLOCK.block), "model.layers.11.eh_proj")
    rules = [WeightSkip("model.layers.*.**", "prediction of later tokens", first=2)]
    wanted = targets(**{"model.layers.1.norm.weight": (4,)})
    for keep in (False, True):
        plan = planned(write(tmp_path / str(keep), tensors), rules, wanted, form=BLOCK, keep=keep)
        assert {info.name for info, _ in plan.skipped} == tensors.keys() - {"model.layers.1.norm.weight"}
        checkpoint.save(plan, checkpoint.load(plan), tmp_path / f"out{keep}")
        assert read(tmp_path / f"out{keep}").keys() == tensors.keys()


def test_a_rule_from_a_targets_own_name_takes_the_place_of_the_copy(tmp_path):
    rules = [WeightConverter("experts.down_proj", "experts.down_proj", [Transpose(1, 2)])]
    folder = write(tmp_path, {"experts.down_proj": numbered(2, 4, 4)})
    plan = planned(folder, rules, targets(**{"experts.down_proj": (2, 4, 4)}))
    assert torch.equal(checkpoint.load(plan)["experts.down_proj"], numbered(2, 4, 4).transpose(1, 2))


def test_a_star_star_stands_only_at_the_end_of_a_skipped_pattern():
    with pytest.raises(ArgumentError):
        WeightSkip("a.**.b", "")
    with pytest.raises(ArgumentError):
        WeightRenaming("a.**", "b")
