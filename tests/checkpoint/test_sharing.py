"""Several processes, one set of files: every byte has one writer, that holds it, and all have about as much to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius import Interleave, MergeModulelist, SaveError, Transpose, WeightConverter, WeightSkip, checkpoint
from moebius.checkpoint import reversing, writing
from moebius.checkpoint.planning import Target
from moebius.checkpoint.sharing import Offer, agreed, payload, written_by
from moebius.checkpoint.team import Alone
from moebius.distributed.layout import ExpertLayout
from tests.checkpoint.folders import numbered, planned, targets, write

FOLDER = Path("/there")
EXPERTS = 6
RULES = {
    "a key each": [WeightConverter("e.*.w", "experts", [MergeModulelist(0)])],
    "in one tensor": [],
    "transposed": [WeightConverter("packed", "experts", [Transpose(1, 2)])],
    "experts last": [WeightConverter("packed", "experts", [Transpose(0, 2)])],
    "experts in the middle": [WeightConverter("packed", "experts", [Transpose(0, 1)])],
    "experts interleaved": [WeightConverter("packed", "experts", [Interleave(0, undo=True)])],
}
WANTED = [*targets(experts=(EXPERTS, 4, 5), large=(7, 6), small=(3,), scalar=()), Target("half", (4,), "bfloat16")]


class Group(Alone):
    """What rank 0 sees of a team whose other ranks have offered something."""

    def __init__(self, others: list[Offer]):
        self.others, self.size = others, 1 + len(others)

    def gathered(self, value: Any, what: str) -> list[Any]:
        return [value, *self.others]


def offers_of(plan: reversing.SavePlan, boxes: list[dict[str, range]]) -> list[Offer]:
    """Of ranks with these boxes, once they agree."""
    alone = [agreed_alone(plan).files for _ in boxes]
    offers = [Offer(str(FOLDER), files, mine, False) for files, mine in zip(alone, boxes, strict=True)]
    return list(agreed(plan, boxes[0], FOLDER, Group(offers[1:])))


def agreed_alone(plan: reversing.SavePlan) -> Offer:
    (offer,) = agreed(plan, {}, FOLDER, Alone())
    return offer


def rows(tensors: dict[str, torch.Tensor], boxes: dict[str, range]) -> dict[str, torch.Tensor]:
    return {n: t[boxes[n].start : boxes[n].stop].clone() if n in boxes else t for n, t in tensors.items()}


def stretches(share: reversing.SavePlan, tensors: dict[str, torch.Tensor]) -> list[tuple[str, int, int]]:
    """(file, offset, end) of all that is written."""
    return [
        (shard.name, job.offset, job.offset + job.nbytes)
        for shard in share.shards
        for job in writing.jobs_of(shard, tensors)
    ]


def assert_each_byte_once(plan: reversing.SavePlan, written: list[tuple[str, int, int]]) -> None:
    for shard in plan.shards:
        end = len(shard.header)
        for offset, stop in sorted((offset, stop) for name, offset, stop in written if name == shard.name):
            assert offset == end
            end = stop
        assert end == shard.nbytes


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.integers(1, 8),  # more ranks than experts too
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([16, 100, 1 << 20]),
)
def test_each_byte_is_written_by_one_rank(layout, ranks, copies, sharded, staging):
    plan = reversing.from_nothing(RULES[layout], WANTED, max_shard_bytes=300)
    tensors = {target.name: torch.zeros(target.shape, dtype=getattr(torch, target.dtype)) for target in WANTED}
    layouts = {"experts": ExpertLayout(EXPERTS, ranks)} | ({"large": ExpertLayout(7, ranks)} if sharded else {})
    boxes = [{name: each.experts_of(rank) for name, each in layouts.items()} for rank in range(ranks)] * copies
    offers = offers_of(plan, boxes)
    before, writing.STAGING_BYTES = writing.STAGING_BYTES, staging
    try:
        shares = [written_by(plan, offers, rank) for rank in range(len(boxes))]
        written = [stretches(share, rows(tensors, mine)) for share, mine in zip(shares, boxes, strict=True)]
    finally:
        writing.STAGING_BYTES = before
    assert_each_byte_once(plan, [one for mine in written for one in mine])
    for share, mine in zip(shares, written, strict=True):
        assert payload(share) == sum(end - start for _, start, end in mine)


def test_what_the_model_does_not_use_is_carried_over_by_one_rank(tmp_path):
    names = ["a", "b", "c"]
    source = write(tmp_path, {name: numbered(10) for name in names} | {"w": numbered(2)})
    plan = planned(source, [WeightSkip(name, "unused") for name in names], targets(w=(2,)))
    saved = reversing.as_loaded(plan, {"w": "float32"})
    offers = offers_of(saved, [{}, {}, {}])
    shares = [written_by(saved, offers, rank) for rank in range(3)]
    assert_each_byte_once(saved, [one for share in shares for one in stretches(share, {"w": numbered(2)})])
    assert max(map(payload, shares)) <= 48


def test_ranks_have_about_as_much_to_do():
    dense = {f"layers.{n}.{w}": (64, size) for n in range(8) for w, size in (("q", 96), ("k", 16), ("o", 64))}
    plan = reversing.from_nothing([], targets(embed=(500, 64), head=(500, 64), experts=(6, 64, 64), **dense))
    layout = ExpertLayout(6, 2)
    offers = offers_of(plan, [{"experts": layout.experts_of(rank % 2)} for rank in range(4)])
    loads = [payload(written_by(plan, offers, rank)) for rank in range(4)]
    assert sum(loads) == plan.nbytes
    assert max(loads) <= 1.1 * plan.nbytes / 4


def test_ranks_begin_with_other_files():
    plan = reversing.from_nothing([], targets(**{f"w{n}": (16, 5) for n in range(8)}), max_shard_bytes=400)
    layout = ExpertLayout(16, 4)
    boxes = [{f"w{n}": layout.experts_of(rank) for n in range(8)} for rank in range(4)]
    offers = offers_of(plan, boxes)
    assert len({written_by(plan, offers, rank).shards[0].name for rank in range(4)}) == 4


# --- ranks that do not fit together ---

PLAN = reversing.from_nothing([], targets(w=(6, 2), v=(3,)))


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([{"w": range(3)}, {"w": range(4, 6)}], "w: held by no rank: rows 3 to 3 of 6"),
        ([{"w": range(3)}, {"w": range(3)}], "w: held by no rank: rows 3 to 5 of 6"),
        ([{"w": range(1, 3)}, {"w": range(3, 6)}], "w: held by no rank: rows 0 to 0 of 6"),
        ([{"w": range(4)}, {"w": range(3, 6)}], "w: held in boxes that overlap: rows 3 to 3 of 6"),
        ([{"w": range(3)}, {}], "w: held in boxes that overlap: rows 0 to 2 of 6"),
        ([{"w": range(6, 6)}, {"w": range(0)}], "w: held by no rank: rows 0 to 5 of 6"),
    ],
)
def test_a_row_that_no_rank_has_or_that_is_cut_in_two_ways_is_refused(boxes, says):
    with pytest.raises(SaveError) as caught:
        offers_of(PLAN, boxes)
    assert says in str(caught.value)


def test_a_process_that_has_its_share_alone_cannot_save_the_model(tmp_path):
    tensors = {"w": numbered(3, 2), "v": numbered(3)}
    with pytest.raises(SaveError, match="w: held by no rank: rows 3 to 5 of 6"):
        checkpoint.save(PLAN, tensors, tmp_path / "model", boxes={"w": range(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_ranks_with_another_model_or_folder_are_named(change):
    target = {"dtype": Target("v", (3,), "bfloat16"), "shape": targets(v=(4,))[0], "name": targets(u=(3,))[0]}[change]
    other = reversing.from_nothing([], [*targets(w=(6, 2)), target])
    there = Offer(str(FOLDER), agreed_alone(other).files, {}, False)
    elsewhere = Offer("/elsewhere", agreed_alone(PLAN).files, {}, False)
    with pytest.raises(SaveError) as caught:
        agreed(PLAN, {}, FOLDER, Group([there, elsewhere]))
    assert [(fault.where, fault.what) for fault in caught.value.faults] == [
        ("rank 1", "another model or layout"),
        ("rank 2", "another folder"),
    ]


@pytest.mark.parametrize("checksums", [True, False])
def test_ranks_that_do_not_all_ask_for_checksums_are_named(tmp_path, checksums):
    """On rank 0, whose save this is, before anything is written."""
    files, folder = agreed_alone(PLAN).files, tmp_path / "model"
    others = Group([Offer(str(folder), files, {}, checksums), Offer(str(folder), files, {}, not checksums)])
    with pytest.raises(SaveError) as caught:
        checkpoint.save(PLAN, {"w": numbered(6, 2), "v": numbered(3)}, folder, checksums=checksums, team=others)
    (fault,) = caught.value.faults
    assert str(fault) == f"rank 2: another option: checksums={not checksums}, on rank 0 {checksums}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("boxes", "what"),
    [({}, "shape"), ({"w": range(2)}, "shape"), ({"w": range(4, 7)}, "no run of its first axis")],
)
def test_tensors_that_are_not_the_rows_of_their_box_are_refused(tmp_path, boxes, what):
    with pytest.raises(SaveError) as caught:
        checkpoint.save(PLAN, {"w": numbered(3, 2), "v": numbered(3)}, tmp_path / "model", boxes=boxes)
    assert caught.value.faults[0].what == what
