"""The experts' suite on tiny layers: every way is a row, with its figures or its reason, and the figures are sound."""

import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from moebius import ArgumentError
from moebius.bench import experts, experts_model
from moebius.bench.experts_cases import SHAPES, Shape, Weights, distinct_experts, make_inputs, shape_of
from moebius.bench.experts_clocks import CpuClock
from moebius.bench.experts_compiling import in_parallel
from moebius.bench.experts_picture import draw_roofline
from moebius.bench.experts_points import Runner, figures_of, make_point, measured
from moebius.bench.experts_tiles import DOWN, GATE_UP, candidates, entry_of, heights, write_table
from moebius.bench.experts_ways import FORWARD, TRAINING, Way, chosen_ways, known_ways
from moebius.bench.reports import write_report
from moebius.cli.bench import bench
from moebius.experts.fused.tuning import ForwardTiles, tiles_of
from moebius.experts.interface import ALL_EXPERTS_FUNCTIONS

TINY = Shape(64, 32, 8, 2)
PEAKS = {"copied_bytes_a_second": 1e10, "read_bytes_a_second": 2e10, "flop_a_second": 1e11}


class QuickClock(CpuClock):
    turn = 0.0


@pytest.fixture(scope="module")
def weights():
    return Weights(TINY, "cpu", torch.float32)


def rows_of(weights, names, tokens=5, passes=FORWARD, forms=()):
    ways = [known_ways(forms)[name] for name in names]
    return {row["way"]: row for row in measured(make_point(weights, tokens, passes), ways, QuickClock(), 1, PEAKS)}


def test_every_backend_and_every_peer_is_a_row_and_agrees_with_eager(weights):
    names = [f"moebius {name}" for name in ALL_EXPERTS_FUNCTIONS]
    names += [f"transformers {name}" for name in ("eager", "batched_mm", "grouped_mm")]
    rows = rows_of(weights, names)
    assert list(rows) == names
    ran = {name for name, row in rows.items() if "reason" not in row}
    assert ran == set(names) - {"moebius fused"}
    assert "it runs on cuda" in rows["moebius fused"]["reason"]
    assert all(rows[name]["error"] < 1e-5 and rows[name]["ms"] > 0 for name in ran)


def test_gradients_are_timed_and_who_has_none_says_so(weights):
    names = ["moebius grouped_mm", "transformers grouped_mm", "transformers eager", "moebius cpu", "moebius eager int8"]
    rows = rows_of(weights, names, passes=TRAINING, forms=["int8"])
    assert ["reason" in rows[name] for name in names] == [False, False, True, True, True]
    assert "no backward" in rows["moebius cpu"]["reason"]
    assert "no gradient" in rows["moebius eager int8"]["reason"]


@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_held_weights_are_judged_by_eager_on_the_same_weights_and_read_fewer_bytes(weights, form):
    row = rows_of(weights, [f"moebius cpu {form}"], forms=[form])[f"moebius cpu {form}"]
    assert row["error"] < 0.02
    assert weights.expert_bytes(form) < weights.expert_bytes() / 3


def test_what_fails_or_errs_is_a_row_with_its_reason_and_the_others_go_on(weights):
    class Broken(torch.nn.Module):
        def forward(self, *given):
            raise ValueError("no such luck")

    class Wrong(torch.nn.Module):
        def forward(self, hidden_states, *given):
            return hidden_states

    ways = [Way("broken", lambda _: Broken()), Way("wrong", lambda _: Wrong()), known_ways()["moebius eager"]]
    broken, wrong, right = measured(make_point(weights, 5, FORWARD), ways, QuickClock(), 1, PEAKS)
    assert broken["reason"] == "ValueError: no such luck"
    assert wrong["reason"].startswith("a wrong answer: ")
    assert right["ms"] > 0


def test_a_call_over_the_limit_is_not_timed_again(weights):
    class Impatient(QuickClock):
        limit = 0.0

    (row,) = measured(make_point(weights, 5, FORWARD), [known_ways()["moebius eager"]], Impatient(), 1, PEAKS)
    assert row["reason"].startswith("too slow: ")


def test_hopeless_ways_are_named_and_never_run():
    shape = SHAPES["qwen3-30b-a3b"]
    weights = Weights.__new__(Weights)
    weights.shape, weights.device = shape, "cuda"
    weights.plain = {
        "one": torch.nn.Parameter(torch.empty(shape.num_experts * shape.weights, device="meta").bfloat16())
    }
    ways = known_ways(["int4"])
    assert ways["moebius eager int4"].hopeless(weights, 512, FORWARD) == "it decodes every expert at each call"
    assert ways["transformers batched_mm"].hopeless(weights, 512, FORWARD) == "it would copy 38.7 GB of weights"
    assert ways["transformers batched_mm"].hopeless(weights, 64, FORWARD) is None
    assert ways["moebius eager"].hopeless(weights, 4096, FORWARD) == "one expert at a time, 128 experts"
    assert ways["moebius grouped_mm"].hopeless(weights, 16384, TRAINING) is None


def test_figures_follow_from_the_times(weights):
    point = make_point(weights, 3, TRAINING)
    distinct = distinct_experts(point.inputs)
    assert 2 <= distinct <= 6
    nbytes = distinct * 3 * 64 * 32 * 4
    assert point.read_bytes(None) == nbytes
    assert point.flop == 3 * 6 * 3 * 2 * 64 * 32
    assert point.floor_seconds(PEAKS, None) == pytest.approx(3 * nbytes / 2e10)
    assert point.floor_seconds({**PEAKS, "flop_a_second": 1e6}, None) == pytest.approx(point.flop / 1e6)


def test_the_median_counts_and_a_graph_where_it_is_faster(weights):
    point, way = make_point(weights, 3, FORWARD), known_ways()["moebius eager"]
    runner = Runner(way, print, 1, 1, 10, 0.0, None, "", [5.0, 1.0, 2.0], [0.5, 0.25, 4.0])
    figures = figures_of(point, runner, PEAKS)
    assert (figures["ms"], figures["graph_ms"]) == (2000.0, 500.0)
    assert figures["teraflop_a_second"] == pytest.approx(point.flop / 0.5 / 1e12)


def test_inputs_differ_by_seed_and_choose_distinct_experts():
    first, second = (make_inputs(TINY, 20, "cpu", torch.bfloat16, seed) for seed in (0, 1))
    assert not first.top_k_index.equal(second.top_k_index)
    assert all(len(set(row)) == 2 for row in first.top_k_index.tolist())
    assert first.top_k_weights.float().sum(dim=-1).sub(1).abs().max() < 0.01


def test_a_report_says_what_ran_and_where_and_is_written_with_a_picture(tmp_path):
    threads = torch.get_num_threads()
    request = experts.Request("cpu", "float32", ["64,32,8,2"], [2, 4], ["moebius eager", "moebius fused"], rounds=1)
    said: list[str] = []
    report = experts.run(request, said.append, "moebius bench experts")
    assert torch.get_num_threads() == threads
    assert len(said) == 3
    assert report["peaks"]["flop_a_second"] > 1e9
    assert [(row["tokens"], row["way"]) for row in report["rows"]] == [
        (tokens, way) for tokens in (2, 4) for way in ("moebius eager", "moebius fused")
    ]
    assert "moebius fused            - device cpu" in experts.table(report)
    write_report(report, tmp_path / "folder" / "report", draw_roofline)
    assert json.loads((tmp_path / "folder" / "report.json").read_text()) == report
    assert (tmp_path / "folder" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def log_as_before():
    """A command sends the library's log to its own stderr."""
    logger = logging.getLogger("moebius")
    before = logger.level, logger.handlers
    yield
    logger.level, logger.handlers = before


@pytest.mark.usefixtures("log_as_before")
def test_the_command_measures_what_its_flags_say(tmp_path):
    flags = [
        "--shape",
        "64,32,8,2",
        "--tokens",
        "3",
        "--rounds",
        "1",
        "--form",
        "int8",
        "--dtype",
        "float32",
        "--backward",
    ]
    ways = ["--way", "moebius eager", "--way", "moebius cpu int8"]
    ended = CliRunner().invoke(
        bench, ["experts", *flags, *ways, "--json", "--quiet", "--out", str(tmp_path / "report")]
    )
    assert ended.exit_code == 0
    report = json.loads(ended.stdout)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["dtype"] == "float32"
    assert [(row["way"], row["passes"]) for row in report["rows"]] == [
        (way, passes) for passes in (FORWARD, TRAINING) for way in ("moebius eager", "moebius cpu int8")
    ]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (experts.Request("tpu"), "device: 'tpu'; known: cuda, cpu"),
        pytest.param(
            experts.Request("cuda"),
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (experts.Request("cpu", shapes=["64,32"]), "shape: '64,32'; known: qwen3-30b-a3b, "),
        (experts.Request("cpu", ways=["fastest"]), "'fastest'; known: moebius auto, "),
        (experts.Request("cpu", forms=["int3"]), "'int3'; known: int8, "),
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(request_, said):
    with pytest.raises(ArgumentError, match=said):
        experts.run(request_, print)


def test_a_device_that_fails_at_one_point_is_a_note_and_what_was_measured_is_kept(monkeypatch):
    def measured_or_not(point, *others):
        if point.tokens == 3:
            raise RuntimeError("out of memory")
        return measured(point, *others)

    monkeypatch.setattr(experts, "measured", measured_or_not)
    request = experts.Request("cpu", shapes=["64,32,8,2"], tokens=[2, 3], ways=["moebius eager"], rounds=1)
    report = experts.run(request, lambda _: None)
    assert [row["tokens"] for row in report["rows"]] == [2]
    assert report["notes"] == ["64,32,8,2, 3 tokens, forward: RuntimeError: out of memory"]


def test_tiles_are_tried_on_a_gpu_alone(tmp_path):
    with pytest.raises(ArgumentError, match="on a GPU; device: 'cpu'"):
        experts.tune(experts.Request("cpu"), tmp_path / "table.json", print)


def test_defaults_leave_out_what_runs_elsewhere_and_train_from_512_tokens():
    assert "moebius cpu" not in {way.name for way in chosen_ways([], [], "cuda")}
    assert "moebius fused" not in {way.name for way in chosen_ways([], [], "cpu")}
    points = experts.Request("cuda", training=True).points()
    assert [tokens for tokens, passes in points if passes == TRAINING] == [512, 4096, 16384]
    assert (7, TRAINING) in experts.Request("cpu", tokens=[7], training=True).points()


def test_a_transformers_model_reads_the_same_with_our_experts():
    tiny = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    tiny |= {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    found = experts_model.prefill("cpu", torch.float32, 1, tokens=12, **tiny)
    assert found["logits_differ"] < 1e-5
    assert found["times_faster"] == pytest.approx(found["transformers_ms"] / found["moebius_ms"])
    assert "Qwen3-MoE, 2 layers, 12 tokens" in experts_model.sentence(found)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_candidates_are_distinct_and_of_the_height_that_both_products_share(block_m):
    for product in (GATE_UP, DOWN):
        found = candidates(product, block_m)
        assert len(set(found)) == len(found) >= 6
        assert {config.block_m for config in found} == {block_m}
        assert all(config.block_n >= 64 for config in found if config.swapped)
        assert all(config.schedule == "tile" for config in found if product == GATE_UP)
        assert all(config.swapped for config in found if block_m < 64)  # the instruction takes 64 rows or more


def test_heights_grow_with_the_rows_of_an_expert():
    assert [heights(rows) for rows in (0.5, 8, 32, 256, 1024)] == [(16,), (16, 32), (32, 64), (64, 128), (128,)]


def test_a_table_that_is_written_reads_as_the_tiles_that_were_measured(tmp_path):
    for product in (GATE_UP, DOWN):
        for config in candidates(product, 64):
            tiles = ForwardTiles(config, config)
            write_table([entry_of(TINY, 12, tiles)], tmp_path / "table.json")
            (entry,) = json.loads((tmp_path / "table.json").read_text())
            assert tiles_of(entry) == tiles
            assert (entry["hidden_size"], entry["intermediate_size"], entry["rows_per_expert"]) == (64, 32, 3.0)


def _succeed_or_fail(job: int) -> None:
    if job == 2:
        raise RuntimeError("out of registers")


def test_compiling_in_parallel_says_which_job_failed_and_ends_what_hangs():
    assert in_parallel(_succeed_or_fail, [1, 2], 60) == [None, "RuntimeError: out of registers"]
    assert in_parallel(_succeed_or_fail, [1], 0) == ["not compiled within 0 s"]


def test_a_shape_is_a_published_name_or_four_numbers():
    assert shape_of("mixtral-8x7b") == Shape(4096, 14336, 8, 2)
    assert shape_of("64,32,8,2") == TINY
