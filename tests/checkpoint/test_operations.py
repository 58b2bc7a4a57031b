"""Operations as algebra: on every layout they do what numpy does to arrays, and their inverse undoes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.checkpoint.operations import (
    Chunk,
    Concatenate,
    Interleave,
    Layout,
    LayoutError,
    MergeModulelist,
    Operation,
    SplitModulelist,
    Transpose,
    forward,
    inverse,
    with_sizes,
)

Arrays = list[list[np.ndarray]]


def numpy_does(operation: Operation, groups: Arrays, outputs: int) -> Arrays:
    """The definition of each operation, on data."""
    match operation:
        case MergeModulelist(dim):
            return [[np.stack(group, dim)] for group in groups]
        case SplitModulelist(dim):
            return [[array for whole in group for array in np.moveaxis(whole, dim, 0)] for group in groups]
        case Concatenate(dim):
            return [[np.concatenate(arrays, dim) for arrays in zip(*groups, strict=True)]]
        case Chunk(dim, sizes):
            cuts = outputs if sizes is None else np.cumsum(sizes)[:-1]
            return [list(pieces) for pieces in zip(*(np.split(whole, cuts, dim) for whole in groups[0]), strict=True)]
        case Transpose(dim0, dim1):
            return [[np.swapaxes(array, dim0, dim1) for array in group] for group in groups]
        case Interleave(dim, undo):
            return [[interleaved(array, dim, undo) for array in group] for group in groups]
    raise AssertionError(operation)


def interleaved(array: np.ndarray, dim: int, undo: bool) -> np.ndarray:
    order = np.arange(array.shape[dim])
    halves = order.reshape(-1, 2).T.ravel() if undo else order.reshape(2, -1).T.ravel()
    return np.take(array, halves, dim)


def filled(layout: Layout, sources: dict[str, np.ndarray]) -> np.ndarray:
    """The tensor that a layout describes; -1 where nothing is put."""
    out = np.full(layout.shape, -1, dtype=np.int64)
    flat = out.reshape(-1)
    for part in layout.parts:
        source = sources[part.name]
        flat[elements(part.place, part.shape, layout.shape)] = source.reshape(-1)[
            elements(part.origin, part.shape, source.shape)
        ]
    return out


def elements(region, shape, whole) -> np.ndarray:
    offset, strides = region.strided(whole)
    index = np.full(shape, offset, dtype=np.int64)
    for axis, stride in enumerate(strides):
        index += (np.arange(shape[axis]) * stride).reshape([-1 if at == axis else 1 for at in range(len(shape))])
    return index.ravel()


@st.composite
def chains(draw):
    """A random chain with groups that it fits: patterns x list x shape, and numbered elements."""
    patterns, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = tuple(2 * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3))))
    numbers = iter(range(0, 1 << 20, int(np.prod(shape))))
    arrays = [
        [np.arange(np.prod(shape)).reshape(shape) + next(numbers) for _ in range(length)] for _ in range(patterns)
    ]
    operations: list[tuple[Operation, int]] = []
    now = arrays
    for _ in range(draw(st.integers(1, 5))):
        operation, outputs = draw(st.sampled_from(possible(now)))
        operations.append((operation, outputs))
        now = numpy_does(operation, now, outputs)
    return arrays, operations


def possible(groups: Arrays) -> list[tuple[Operation, int]]:
    """Every operation that these groups admit."""
    shape, rank = groups[0][0].shape, groups[0][0].ndim
    same = all(array.shape == shape for group in groups for array in group)
    found: list[tuple[Operation, int]] = [(Transpose(a, b), 0) for a in range(rank) for b in range(rank)]
    found += [
        (Interleave(dim, undo), 0) for dim in range(rank) for undo in (True, False) if shape[dim] % 2 == 0 and same
    ]
    found += [(MergeModulelist(dim), 0) for dim in range(rank + 1) if same and rank < 4]
    found += [(Concatenate(dim), 0) for dim in range(rank) if same]
    if len(groups) == 1:
        found += [(Chunk(dim), 2) for dim in range(rank) if shape[dim] % 2 == 0 and same]
        found += [(Chunk(dim, (1, shape[dim] - 1)), 2) for dim in range(rank) if shape[dim] > 1 and same]
        found += [(SplitModulelist(dim), 0) for dim in range(rank) if len(groups[0]) == 1 and rank > 1]
    return found


def as_layouts(arrays: Arrays):
    names = {f"{pattern}.{index}": array for pattern, group in enumerate(arrays) for index, array in enumerate(group)}
    layouts = [
        [Layout.whole(f"{pattern}.{index}", array.shape) for index, array in enumerate(group)]
        for pattern, group in enumerate(arrays)
    ]
    return layouts, names


@settings(max_examples=300, deadline=None)
@given(chains())
def test_a_chain_on_layouts_does_what_it_does_on_data(case):
    arrays, operations = case
    layouts, names = as_layouts(arrays)
    for operation, outputs in operations:
        layouts = operation.apply(layouts, outputs)
        arrays = numpy_does(operation, arrays, outputs)
    for layout_group, array_group in zip(layouts, arrays, strict=True):
        for layout, array in zip(layout_group, array_group, strict=True):
            np.testing.assert_array_equal(filled(layout, names), array)


@settings(max_examples=300, deadline=None)
@given(chains())
def test_the_inverse_undoes_every_operation(case):
    arrays, operations = case
    layouts, names = as_layouts(arrays)
    for operation, outputs in operations:
        sized = operation.sized(layouts)
        there = sized.apply(layouts, outputs)
        back = sized.inverse().apply(there, len(layouts))
        for back_group, group in zip(back, layouts, strict=True):
            for one, other in zip(back_group, group, strict=True):
                np.testing.assert_array_equal(filled(one, names), filled(other, names))
        layouts = there


def test_the_example_of_the_field_packs_gate_rows_before_up_rows():
    gates = [np.full((2, 3), 10 + expert) for expert in range(4)]
    ups = [np.full((2, 3), 20 + expert) for expert in range(4)]
    layouts, names = as_layouts([gates, ups])
    ((packed,),) = forward([MergeModulelist(dim=0), Concatenate(dim=1)], layouts, 1)
    assert packed.shape == (4, 4, 3)
    np.testing.assert_array_equal(filled(packed, names)[2], [[12] * 3, [12] * 3, [22] * 3, [22] * 3])


def test_a_packed_expert_comes_apart_into_one_part_each():
    chain = inverse([MergeModulelist(dim=0), Concatenate(dim=1)])
    groups = forward(chain, [[Layout.whole("gate_up_proj", (4, 6, 5))]], 2)
    assert [len(group) for group in groups] == [4, 4]
    assert all(len(layout.parts) == 1 and layout.shape == (3, 5) for group in groups for layout in group)
    assert groups[1][2].parts[0].origin.strided((4, 6, 5)) == (2 * 30 + 15, (5, 1))


def test_unequal_parts_keep_their_sizes_on_the_way_back():
    sizes = [Layout.whole(name, (rows, 8)) for name, rows in (("q", 8), ("k", 2), ("v", 2))]
    (joined,) = with_sizes([Concatenate(0)], [[layout] for layout in sizes], 1)
    assert joined.inverse() == Chunk(0, (8, 2, 2))


@pytest.mark.parametrize(
    ("operations", "shape", "outputs", "says"),
    [
        ([Chunk(0)], (5, 4), 2, "cannot be cut"),
        ([Chunk(0, (2, 2))], (5, 4), 2, "cannot be cut"),
        ([Chunk(2)], (4, 4), 2, "no axis 2"),
        ([Transpose(0, 2)], (4, 4), 1, "no axis 2"),
        ([Interleave(0)], (3, 4), 1, "no halves"),
        ([MergeModulelist(3)], (4, 4), 1, "no place"),
    ],
)
def test_what_does_not_fit_is_refused(operations, shape, outputs, says):
    with pytest.raises(LayoutError, match=says):
        forward(operations, [[Layout.whole("x", shape)]], outputs)


def test_tensors_of_different_shapes_are_not_stacked_or_joined():
    different = [Layout.whole("a", (2, 3)), Layout.whole("b", (2, 4))]
    with pytest.raises(LayoutError, match="different shapes"):
        MergeModulelist(0).apply([different], 1)
    with pytest.raises(LayoutError, match="cannot be joined"):
        Concatenate(0).apply([[layout] for layout in different], 1)
