"""Plans: every key routed once, both directions of a conversion, user's rules first, all faults at once."""

import pytest
import torch

from moebius import (
    ArgumentError,
    CheckpointError,
    Chunk,
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightSkip,
    checkpoint,
)
from moebius.checkpoint.planning import Target
from tests.checkpoint.folders import numbered, planned, targets, write

PACK = WeightConverter(
    ["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
    "mlp.experts.gate_up_proj",
    operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
)
UNPACK = WeightConverter(
    "mlp.experts.gate_up_proj",
    ["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
    operations=[Chunk(dim=1), SplitModulelist(dim=0)],
)
EXPERTS, WIDTH, HIDDEN = 12, 3, 5


def per_expert(layers: int = 2) -> dict[str, torch.Tensor]:
    keys = [
        f"layers.{n}.block_sparse_moe.experts.{e}.{w}.weight"
        for n in range(layers)
        for e in range(EXPERTS)
        for w in ("w1", "w3")
    ]
    return {key: numbered(WIDTH, HIDDEN, start=at * WIDTH * HIDDEN) for at, key in enumerate(keys)}


def packed(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    name = "layers.{}.block_sparse_moe.experts.{}.{}.weight"
    halves = [torch.stack([tensors[name.format(layer, e, w)] for e in range(EXPERTS)]) for w in ("w1", "w3")]
    return torch.cat(halves, dim=1)


def faults_of(folder, rules, wanted, **options) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        planned(folder, rules, wanted, **options)
    return [str(fault) for fault in caught.value.faults]


PACKED = [Target(f"layers.{n}.mlp.experts.gate_up_proj", (EXPERTS, 2 * WIDTH, HIDDEN), "float32") for n in range(2)]
UNPACKED = [Target(key, (WIDTH, HIDDEN), "float32") for key in per_expert()]


@pytest.mark.parametrize("shards", [1, 3])
def test_per_expert_tensors_become_packed_ones(tmp_path, shards):
    tensors = per_expert()
    plan = planned(write(tmp_path, tensors, shards), [PACK], PACKED)
    loaded = checkpoint.load(plan)
    for layer in range(2):
        assert torch.equal(loaded[PACKED[layer].name], packed(tensors, layer))
    assert len(plan.reads) == len(tensors)
    assert plan.bytes_to_read == sum(tensor.nbytes for tensor in tensors.values())


def test_the_reverse_takes_packed_tensors_apart(tmp_path):
    tensors = per_expert()
    fused = {PACKED[layer].name: packed(tensors, layer) for layer in range(2)}
    loaded = checkpoint.load(planned(write(tmp_path, fused), [UNPACK], UNPACKED))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_the_fused_form_is_taken_without_a_rule(tmp_path):
    fused = {PACKED[0].name: numbered(EXPERTS, 2 * WIDTH, HIDDEN)}
    loaded = checkpoint.load(planned(write(tmp_path, fused), [PACK], PACKED[:1]))
    assert torch.equal(loaded[PACKED[0].name], fused[PACKED[0].name])


def test_transposed_experts_go_through_the_same_plan(tmp_path):
    rule = WeightConverter("experts.*.w", "packed", [Transpose(0, 1), MergeModulelist(1)])
    tensors = {f"experts.{e}.w": numbered(4, 6, start=24 * e) for e in range(3)}
    loaded = checkpoint.load(planned(write(tmp_path, tensors), [rule], targets(packed=(6, 3, 4))))
    assert torch.equal(loaded["packed"], torch.stack([tensors[f"experts.{e}.w"].T for e in range(3)], dim=1))


def test_unequal_parts_are_joined_by_their_stored_sizes(tmp_path):
    tensors = {"q": numbered(8, 4), "k": numbered(2, 4, start=50), "v": numbered(2, 4, start=70)}
    rule = WeightConverter(["q", "k", "v"], "qkv", [Concatenate(0)])
    loaded = checkpoint.load(planned(write(tmp_path, tensors), [rule], targets(qkv=(12, 4))))
    assert torch.equal(loaded["qkv"], torch.cat(list(tensors.values())))


def test_indices_in_front_are_carried_over(tmp_path):
    rule = WeightRenaming("blocks.*.attn.out", "layers.*.attention.output")
    tensors = {f"blocks.{n}.attn.out": numbered(2, 2, start=4 * n) for n in (0, 1, 10)}
    wanted = [Target(f"layers.{n}.attention.output", (2, 2), "float32") for n in (0, 1, 10)]
    loaded = checkpoint.load(planned(write(tmp_path, tensors), [rule], wanted))
    assert loaded["layers.10.attention.output"][0, 0] == 40


def test_a_users_rule_comes_before_the_familys(tmp_path):
    swapped = WeightConverter(
        ["block_sparse_moe.experts.*.w3.weight", "block_sparse_moe.experts.*.w1.weight"],
        "mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    tensors = per_expert(layers=1)
    plan = planned(write(tmp_path, tensors), [PACK], PACKED[:1], overrides=[swapped])
    expected = packed(tensors, 0).unflatten(1, (2, WIDTH)).flip(1).flatten(1, 2)
    assert torch.equal(checkpoint.load(plan)[PACKED[0].name], expected)
    assert "{w3,w1}" in str(plan)


def test_a_users_rule_that_no_key_fits_is_refused(tmp_path):
    other = WeightConverter("elsewhere.*.w", "mlp.experts.gate_up_proj", [MergeModulelist(0)])
    with pytest.raises(ArgumentError, match=r"elsewhere.*no key fits it"):
        planned(write(tmp_path, per_expert(1)), [PACK], PACKED[:1], overrides=[other])


def test_skipped_keys_are_listed_with_their_reason(tmp_path):
    tensors = {"w": numbered(2), "layers.0.rotary_emb.inv_freq": numbered(4)}
    plan = planned(write(tmp_path, tensors), [WeightSkip("rotary_emb.inv_freq", "computed")], targets(w=(2,)))
    assert [(info.name, reason) for info, reason in plan.skipped] == [("layers.0.rotary_emb.inv_freq", "computed")]
    assert "skipped: computed" in str(plan)


def test_floats_are_cast_and_the_plan_says_so(tmp_path):
    values = torch.randn(3, 4).to(torch.bfloat16)
    plan = planned(write(tmp_path, {"w": values}), [], targets(w=(3, 4)))
    assert "bfloat16 -> float32" in str(plan)
    assert torch.equal(checkpoint.load(plan)["w"], values.float())


def test_a_scalar_and_an_empty_tensor_are_tensors_too(tmp_path):
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    loaded = checkpoint.load(planned(write(tmp_path, tensors), [], targets(scalar=(), empty=(0, 4))))
    assert loaded["scalar"] == 3
    assert loaded["empty"].shape == (0, 4)


# --- tied weights ---

TIED = [Target("embed", (3, 2), "float32", aliases=("head",))]


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_tied_weight_may_be_stored_under_either_name(tmp_path, name):
    loaded = checkpoint.load(planned(write(tmp_path, {name: numbered(3, 2)}), [], TIED))
    assert torch.equal(loaded["embed"], numbered(3, 2))


def test_a_tied_weight_stored_twice_must_be_equal(tmp_path):
    same = write(tmp_path / "same", {"embed": numbered(3, 2), "head": numbered(3, 2)})
    assert torch.equal(checkpoint.load(planned(same, [], TIED))["embed"], numbered(3, 2))
    differs = write(tmp_path / "differs", {"embed": numbered(3, 2), "head": numbered(3, 2, start=1)})
    with pytest.raises(CheckpointError, match="head: tied weights differ"):
        checkpoint.load(planned(differs, [], TIED))
    mismatched = write(tmp_path / "shape", {"embed": numbered(3, 2), "head": numbered(2, 2)})
    assert "head: tied weights differ" in faults_of(mismatched, [], TIED)[0]


# --- faults ---


def test_a_missing_expert_is_named(tmp_path):
    tensors = per_expert(1)
    del tensors["layers.0.block_sparse_moe.experts.7.w3.weight"]
    (fault,) = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert "experts.7.w3.weight: missing: expected [3, 5] float32; ids found: 0-6, 8-11" in fault


def test_a_gap_is_told_by_the_ids(tmp_path):
    tensors = {key: tensor for key, tensor in per_expert(1).items() if not 2 <= int(key.split(".")[4]) <= 7}
    faults = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert len(faults) == 2
    assert "experts.*.w1.weight: gap: expected [3, 5] float32; ids found: 0-1, 8-11; the model holds 0-11" in faults[0]


def test_a_shifted_list_is_both_missing_and_extra(tmp_path):
    tensors = {key.replace("experts.3.", "experts.12."): tensor for key, tensor in per_expert(1).items()}
    faults = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert [fault.split(": ")[1] for fault in faults] == ["missing", "missing", "extra index", "extra index"]


def test_a_wholly_missing_list_is_one_fault(tmp_path):
    (fault,) = faults_of(write(tmp_path, {"w": numbered(1)}), [PACK], [*PACKED[:1], *targets(w=(1,))])[:1]
    assert "experts.*.w1.weight: missing: expected [3, 5] float32; ids found: none" in fault


def test_two_layouts_of_one_parameter_are_refused(tmp_path):
    tensors = per_expert(1) | {PACKED[0].name: numbered(EXPERTS, 2 * WIDTH, HIDDEN)}
    faults = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert "two layouts at once" in faults[0]
    assert all(key in faults[0] for key in (PACKED[0].name, "layers.0.block_sparse_moe.experts.0.w1.weight"))


def test_wrong_shapes_are_named_at_the_key(tmp_path):
    tensors = per_expert(1)
    tensors["layers.0.block_sparse_moe.experts.0.w1.weight"] = numbered(WIDTH + 1, HIDDEN)
    (fault,) = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert "experts.0.w1.weight: shape: expected [3, 5], found [4, 5] float32 in model.safetensors" in fault


def test_one_expert_of_another_dtype_is_named(tmp_path):
    tensors = per_expert(1)
    key = "layers.0.block_sparse_moe.experts.4.w1.weight"
    tensors[key] = tensors[key].half()
    (fault,) = faults_of(write(tmp_path, tensors), [PACK], PACKED[:1])
    assert fault.startswith(f"{key}: dtype: found float16 in model.safetensors; its 23 siblings are float32")


def test_integers_are_never_cast(tmp_path):
    (fault,) = faults_of(write(tmp_path, {"w": torch.ones(2, dtype=torch.int8)}), [], targets(w=(2,)))
    assert fault.startswith("w: dtype: found int8 in model.safetensors, expected float32")


def test_keys_that_nothing_takes_are_unexpected(tmp_path):
    (fault,) = faults_of(write(tmp_path, {"w": numbered(2), "v": numbered(2)}), [], targets(w=(2,)))
    assert fault == "v: unexpected: in model.safetensors; no parameter of the model takes it"


def test_a_key_cannot_fill_two_parameters(tmp_path):
    rules = [WeightRenaming("w", "a"), WeightRenaming("w", "b")]
    assert "w: claimed twice: for a and b" in faults_of(
        write(tmp_path, {"w": numbered(2)}), rules, targets(a=(2,), b=(2,))
    )


def test_a_key_cannot_be_used_and_skipped(tmp_path):
    faults = faults_of(write(tmp_path, {"w": numbered(2)}), [WeightSkip("w", "why")], targets(w=(2,)))
    assert faults == ["w: claimed twice: for w and to be skipped"]


def test_a_rule_that_does_not_fit_the_parameters_shape_is_named(tmp_path):
    rule = WeightConverter(["a", "b"], "ab", [Concatenate(0)])
    faults = faults_of(write(tmp_path, {"a": numbered(2), "b": numbered(2)}), [rule], targets(ab=(5,)))
    assert "ab: cannot be converted: WeightConverter(a,b -> ab): an axis of 5 cannot be cut" in faults[0]


def test_all_faults_come_at_once(tmp_path):
    tensors = {"a": numbered(3), "c": torch.ones(2, dtype=torch.int8), "x": numbered(1)}
    with pytest.raises(CheckpointError, match=r"4 faults in .*; no weight was read") as caught:
        planned(write(tmp_path, tensors), [], targets(a=(2,), b=(2,), c=(2,)))
    assert {fault.what for fault in caught.value.faults} == {"shape", "missing", "dtype", "unexpected"}


def test_a_plan_is_plain_data_too(tmp_path):
    report = planned(write(tmp_path, per_expert(), 2), [PACK], PACKED).to_json()
    (row,) = report["rows"]
    assert row["tensors"] == 48
    assert row["operations"] == ("MergeModulelist", "Concatenate")
    assert report["bytes_to_read"] == report["target_bytes"] == 48 * WIDTH * HIDDEN * 4
