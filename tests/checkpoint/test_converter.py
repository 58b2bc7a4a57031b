"""Patterns are templates on whole segments; rules whose patterns and operations disagree are refused."""

import pytest

from moebius import Chunk, Concatenate, MergeModulelist, SplitModulelist, WeightConverter, WeightRenaming, WeightSkip
from moebius.checkpoint.converter import Match, Pattern, fits_template, is_index, template_of
from moebius.errors import ArgumentError


@pytest.mark.parametrize(
    ("pattern", "key", "prefix", "indices"),
    [
        ("experts.*.w1.weight", "model.layers.3.experts.17.w1.weight", "model.layers.3.", (17,)),
        ("experts.*.w1.weight", "experts.0.w1.weight", "", (0,)),
        ("layers.*.experts.*.w1", "model.layers.3.experts.17.w1", "model.", (3, 17)),
        ("layers.0.norm", "model.layers.0.norm", "model.", ()),
    ],
)
def test_a_pattern_matches_whole_segments_to_the_end(pattern, key, prefix, indices):
    match = Pattern(pattern).match(key)
    assert match == Match(prefix, indices)
    assert Pattern(pattern).fill(match.prefix, match.indices) == key


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ("experts.*.up_proj.weight", "model.layers.0.mlp.shared_experts.0.up_proj.weight"),
        ("experts.*.up_proj.weight", "mlp.experts.0.up_proj.weight.scale"),
        ("experts.*.up_proj.weight", "mlp.experts.03.up_proj.weight"),
        ("experts.*.up_proj.weight", "mlp.experts.-1.up_proj.weight"),
        ("experts.*.up_proj.weight", "mlp.experts.٣.up_proj.weight"),
        ("experts.*.up_proj.weight", "mlp.experts.up_proj.weight"),
        ("layers.0.norm", "model.layers.10.norm"),
        ("a.b.c", "b.c"),
    ],
)
def test_what_is_not_the_template_does_not_match(pattern, key):
    assert Pattern(pattern).match(key) is None


@pytest.mark.parametrize("segment", ["0", "7", "10", "127"])
def test_decimals_are_indices(segment):
    assert is_index(segment)


@pytest.mark.parametrize("segment", ["", "00", "03", "-1", "1.5", "٣", "²", "x1"])
def test_other_segments_are_not(segment):
    assert not is_index(segment)


@pytest.mark.parametrize("text", ["", ".", "a..b", "experts.*w1", "experts.**.w1", ".a", "a."])
def test_a_broken_pattern_is_refused(text):
    with pytest.raises(ArgumentError, match="is not a pattern"):
        WeightSkip(text, "because")


def test_templates_put_keys_together():
    assert template_of("model.layers.3.mlp.experts.17.up_proj.weight") == "model.layers.*.mlp.experts.*.up_proj.weight"
    patterns = (Pattern("experts.3.up_proj.weight"), Pattern("norm.weight"))
    assert fits_template(patterns, "model.layers.*.mlp.experts.*.up_proj.weight")
    assert not fits_template(patterns, "model.layers.*.mlp.shared_experts.*.up_proj.weight")
    assert not fits_template((Pattern("norm.weight"),), "model.q_norm.weight")


def test_the_example_of_the_field_is_taken_as_written():
    rule = WeightConverter(
        ["block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"],
        "mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    assert (rule.merged, rule.carried) == (1, 0)
    assert rule.match_source("model.layers.3.block_sparse_moe.experts.5.w3.weight") == Match("model.layers.3.", ())
    assert rule.match_target("model.layers.3.mlp.experts.gate_up_proj") == Match("model.layers.3.", ())
    assert rule.list_index("model.layers.3.block_sparse_moe.experts.5.w3.weight") == 5


@pytest.mark.parametrize(
    ("sources", "target", "operations", "says"),
    [
        (["a.*.w1", "b.w3"], "c", [MergeModulelist(0), Concatenate(1)], "same number"),
        ("a.*.b.*.w", "c", [MergeModulelist(0)], "2 lists at once"),
        ("a.*.w", "c", [], "ask for 1 merged lists"),
        ("a.w", "c", [MergeModulelist(0)], "ask for 0 merged lists"),
        ("a.*.w", "c", [SplitModulelist(0)], "make -1"),
        (["a.w1", "a.w3"], "c", [], "operations that join or cut"),
        ([], "c", [], "same number"),
    ],
)
def test_patterns_and_operations_that_disagree_are_refused(sources, target, operations, says):
    with pytest.raises(ArgumentError, match=says):
        WeightConverter(sources, target, operations)


def test_rules_are_equal_by_what_they_say():
    assert WeightRenaming("a.b", "c.d") == WeightRenaming("a.b", "c.d")
    assert WeightConverter("a", ["b", "c"], [Chunk(0)]) != WeightConverter("a", ["b", "c"], [Chunk(1)])
