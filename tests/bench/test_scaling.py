"""The arithmetic of scaling: its limits, a count of rows by trying, and the design's own numbers."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from moebius import ArgumentError
from moebius.bench import scaling
from moebius.bench.checkpoints import QWEN3_30B_A3B
from moebius.bench.scaling import SHAPES, Exchange, Rates

QWEN_30B, QWEN_235B, DEEPSEEK_V3 = SHAPES
GOAL = Rates(flop=593e12)


@pytest.mark.parametrize("exchange", get_args(Exchange))
def test_one_rank_sends_nothing(exchange):
    assert scaling.rows_a_token(exchange, 128, 8, 1) == 0


@pytest.mark.parametrize(
    ("ep", "pairs", "gathered", "rows"), [(2, 4.0, 1, 1.0), (4, 6.0, 3, 2.7), (8, 7.0, 7, 4.7), (16, 7.5, 15, 6.2)]
)
def test_rows_a_token_top_8_of_128(ep, pairs, gathered, rows):
    found = [round(scaling.rows_a_token(exchange, 128, 8, ep), 1) for exchange in get_args(Exchange)]
    assert found == [pairs, gathered, rows]


@pytest.mark.parametrize(("num_experts", "top_k", "ep"), [(16, 3, 4), (8, 2, 8), (12, 5, 2)])
def test_rows_a_token_are_those_that_chosen_experts_ask_for(num_experts, top_k, ep):
    draw, tokens = random.Random(0), 20_000
    visited = sum(
        len({expert * ep // num_experts for expert in draw.sample(range(num_experts), top_k)} - {0})
        for _ in range(tokens)
    )
    assert visited / tokens == pytest.approx(scaling.rows_a_token("all_to_all", num_experts, top_k, ep), rel=0.02)


def test_no_exchange_sends_more_than_one_that_knows_less():
    for ep in (2, 4, 8, 16, 32, 64, 128):
        fewest = scaling.rows_a_token("all_to_all", 128, 8, ep)
        assert fewest <= scaling.rows_a_token("gather_scatter", 128, 8, ep)
        assert fewest <= scaling.rows_a_token("row a (token, expert)", 128, 8, ep) + 1e-9


@pytest.mark.parametrize(
    ("shape", "compute", "times"),
    [
        (QWEN_30B, 127, [26, 123, 192, 525, 901]),
        (QWEN_235B, 509, [53, 247, 384, 1049, 1801]),
        (DEEPSEEK_V3, 1337, [92, 428, 672, 1829, 3125]),
    ],
)
def test_forward_in_nanoseconds_a_token_and_layer(shape, compute, times):
    assert round(scaling.compute_seconds(shape, GOAL) * 1e9) == compute
    assert [round(scaling.exchange_seconds(shape, GOAL, ep) * 1e9) for ep in (2, 8, 16, 32, 64)] == times


@pytest.mark.parametrize(("shape", "time"), [(QWEN_30B, 1312), (QWEN_235B, 2624), (DEEPSEEK_V3, 4531)])
def test_without_the_two_levels_every_row_of_another_node_goes_between_nodes(shape, time):
    assert round(scaling.exchange_seconds(shape, GOAL, 64, two_level=False) * 1e9) == time


@pytest.mark.parametrize("shape", SHAPES)
def test_within_a_node_there_is_one_level(shape):
    for ep in (1, 2, 4, 8):
        both = [scaling.exchange_seconds(shape, GOAL, ep, two_level=level) for level in (True, False)]
        assert both[0] == both[1]
    assert scaling.exchange_seconds(shape, GOAL, 1) == 0


@pytest.mark.parametrize(
    ("shape", "gpus", "span"),
    [
        (QWEN_30B, 8, (0.61, 1.0)),
        (QWEN_30B, 64, (0.50, 0.98)),
        (QWEN_30B, 1024, (0.48, 0.94)),
        (QWEN_235B, 64, (0.60, 1.0)),
        (QWEN_235B, 1024, (0.58, 1.0)),
        (DEEPSEEK_V3, 256, (0.48, 0.93)),
        (DEEPSEEK_V3, 1024, (0.48, 0.91)),
    ],
)
def test_training_efficiency(shape, gpus, span):
    found = scaling.training_efficiency(shape, GOAL, gpus)
    assert found == pytest.approx(span, abs=0.0051)


def test_more_tokens_a_step_hide_the_copies_and_faster_links_everything():
    few, many = (scaling.training_efficiency(QWEN_30B, GOAL, 1024, tokens) for tokens in (8192, 65_536))
    assert few < many
    unlimited = replace(GOAL, nvlink=1e30, infiniband=1e30)
    assert scaling.training_efficiency(QWEN_30B, unlimited, 1024) == pytest.approx((1.0, 1.0))


def test_too_few_gpus_are_told_from_enough():
    assert next(gpus for gpus in scaling.GPUS if scaling.fits(QWEN_235B, GOAL, gpus)) == 64
    assert next(gpus for gpus in scaling.GPUS if scaling.fits(DEEPSEEK_V3, GOAL, gpus)) == 128
    assert "            -" in scaling.table(scaling.run(GOAL, Path("none.json")))


def measured(speedup: float, milliseconds: float) -> dict:
    one = {"way": "moebius 1", "prefill": {"seconds": 0.0765, "tokens_a_second": 107_000.0}}
    both = {"way": "moebius ep", "prefill": {"seconds": 0.08, "tokens_a_second": 107_000.0 * speedup}}
    exchange = {"batch": "distinct", "exchange": "gather_scatter", "tokens": 8192, "seconds": milliseconds / 1e3}
    model = {**QWEN3_30B_A3B, "num_hidden_layers": 12}
    return {"model": model, "ranks": 2, "tokens": 8192, "rows": [one, both], "exchanges": [exchange]}


def test_it_is_held_against_a_measurement():
    prefill, exchange = scaling.run(GOAL, Path("report.json"), measured(1.8, 0.3))["check"]
    assert prefill["measured"] == pytest.approx(1.8)
    assert prefill["model"] == pytest.approx(1.93, abs=0.01)  # 778 ns a token and layer alone, 26 more for the exchange
    assert (round(exchange["model"], 2), exchange["measured"]) == (0.22, 0.3)


def test_a_measurement_without_these_ways_is_held_against_nothing():
    report = measured(1.8, 0.3) | {"rows": [{"way": "moebius 1", "reason": "no GPU"}], "exchanges": []}
    assert scaling.run(GOAL, Path("report.json"), report)["check"] == []


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ArgumentError, match="nvlink: expected more than 0"):
        Rates(nvlink=0)


def test_the_command_prints_the_arithmetic_and_says_that_it_is_that(tmp_path):
    from moebius.cli.bench import bench

    ended = CliRunner().invoke(bench, ["scaling", "--tflops", "593", "--measured", str(tmp_path / "none.json")])
    assert ended.exit_code == 0
    assert "Arithmetic, not measured" in ended.output
    assert "no measurement" in ended.output
    assert "192 (636)" in ended.output


def test_without_a_measurement_it_says_where_it_looked_and_how_to_give_one(tmp_path, monkeypatch):
    from moebius.cli.bench import bench

    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(bench, ["scaling"]).output.splitlines()[-1]
    assert said == (
        f"no measurement to hold it against: there is no {tmp_path}/benchmarks/parallel_h200.json; "
        "give a report of `moebius bench parallel` with --measured"
    )
    other = measured(1.8, 0.3) | {"rows": [], "exchanges": []}
    (tmp_path / "other.json").write_text(json.dumps(other))
    said = CliRunner().invoke(bench, ["scaling", "--measured", "other.json"]).output.splitlines()[-1]
    assert said.startswith("no measurement to hold it against: other.json has neither ")
