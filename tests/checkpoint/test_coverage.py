"""The independent check of a finished plan: every element of every target written exactly once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.checkpoint.coverage import uncovered
from moebius.checkpoint.operations import Part, Region, Transpose, forward
from tests.checkpoint.test_operations import as_layouts, chains


def part(*spans: tuple[int, int, int]) -> Part:
    """A part whose origin is a box: (start, step, count) an axis."""
    starts, steps, counts = zip(*spans, strict=True)
    region = Region(starts, tuple(range(len(spans))), steps)
    return Part("x", counts, region, region)


def verdict(shape, *parts: Part) -> str:
    return ", ".join(fault.detail for fault in uncovered({"x": shape}, parts))


def test_two_halves_cover():
    assert verdict((4, 6), part((0, 1, 2), (0, 1, 6)), part((2, 1, 2), (0, 1, 6))) == ""


def test_alternating_rows_cover():
    assert verdict((4, 6), part((0, 2, 2), (0, 1, 6)), part((1, 2, 2), (0, 1, 6))) == ""


def test_a_missing_row_is_found():
    assert "24 elements, 18 would be written" in verdict((4, 6), part((0, 1, 3), (0, 1, 6)))


def test_an_overlap_that_keeps_the_volume_is_found():
    assert verdict((4, 6), part((0, 1, 2), (0, 1, 6)), part((1, 1, 2), (0, 1, 6))) == "two parts overlap"


def test_an_overlap_of_strided_rows_is_found():
    assert verdict((4, 6), part((0, 2, 2), (0, 1, 6)), part((0, 1, 2), (0, 1, 6))) == "two parts overlap"


def test_a_part_twice_is_found():
    assert verdict((4,), part((0, 1, 2)), part((0, 1, 2))) == "two parts overlap"


def test_a_part_outside_is_found():
    assert verdict((4,), part((0, 1, 2)), part((3, 1, 2))) == "a part reaches outside the tensor"


def test_a_tensor_that_nothing_fills_is_found():
    assert "4 elements, 0 would be written" in verdict((4,))


@settings(max_examples=200, deadline=None)
@given(chains(), st.randoms())
def test_what_any_chain_makes_is_covered_and_losing_a_part_is_not(case, random):
    arrays, operations = case
    groups, names = as_layouts(arrays)
    for operation, outputs in operations:
        groups = forward([operation, Transpose(0, 0)], groups, outputs)
    parts = [part for group in groups for layout in group for part in layout.parts]
    shapes = {name: array.shape for name, array in names.items()}
    assert not uncovered(shapes, parts)
    parts.remove(random.choice(parts))
    assert uncovered(shapes, parts)
