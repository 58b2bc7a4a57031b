"""The parallel suite: what ranks find on a tiny checkpoint, how it is put together, and what becomes of failures."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from moebius import ArgumentError, MoebiusError
from moebius.bench import parallel
from moebius.bench.checkpoints import write_checkpoint
from moebius.bench.parallel_exchanges import exchange_rows
from moebius.bench.parallel_picture import draw_parallel
from moebius.bench.parallel_rows import share_bytes, table, way_row
from moebius.bench.parallel_ways import WAYS
from moebius.bench.parallel_worker import Findings, Job, difference, measure, timed
from moebius.bench.reports import write_report
from tests.distributed.pool import run_ranks
from tests.families import tiny_config

CONFIG = tiny_config("qwen3_moe", torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parallel") / "model"
    write_checkpoint(place, CONFIG)
    return place


def job_for(way, folder, found) -> Job:
    return Job(way, str(folder), "cpu", "auto", 2, 16, 4, 8, 2, 60.0, str(found), str(found / "reference.pt"))


def measured(ranks, job: Job) -> None:
    measure(job, Findings(parallel.Path(job.found) / f"rank-{ranks.rank if ranks else 0}.json"))


def exchanged(ranks, folder) -> list[dict]:
    return exchange_rows(folder, "cpu", 16, 1, timed)


def row_of(way, launches):
    return way_row(way, launches, ranks=2, tokens=16, config=CONFIG)


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """The rows of our ways, measured here and on two ranks."""
    rows = []
    place = tmp_path_factory.mktemp("found")
    for way in ("moebius 1", "moebius ep", "moebius ep shared"):
        job = job_for(way, folder, place)
        size = WAYS[way].size(2)
        if size == 1:
            measured(None, job)
        else:
            run_ranks(size, measured, job)
        rows.append(row_of(way, [[parallel.found_by(place / f"rank-{rank}.json", "") for rank in range(size)]]))
    return {row["way"]: row for row in rows}


def report_of(rows) -> dict:
    return {
        "date": "2026-01-01",
        "machine": {"cpu": "one"},
        "device": "cpu",
        "model": CONFIG,
        "ranks": 2,
        "tokens": 16,
        "decode": {"rows": 4, "cached": 8},
        "rows": list(rows),
        "exchanges": [],
    }


def test_every_way_of_ours_is_measured_and_agrees_with_one_process(found):
    for row in found.values():
        assert "reason" not in row
        assert row["prefill"]["tokens_a_second"] > 0
        assert row["step_seconds"] > 0
    assert "comparison" not in found["moebius 1"]
    assert 0 <= found["moebius ep"]["comparison"]["relative"] < 0.01
    assert 0 <= found["moebius ep shared"]["comparison"]["relative"] < 0.01
    parallel.refuse_wrong(report_of(found.values()))


def test_ranks_with_a_batch_each_are_held_against_their_own(folder, tmp_path):
    measured(None, job_for("moebius 1", folder, tmp_path))
    expected = torch.load(tmp_path / "reference.pt")
    expected[1] *= -1
    torch.save(expected, tmp_path / "reference.pt")
    run_ranks(2, measured, job_for("moebius ep", folder, tmp_path))
    found = [parallel.found_by(tmp_path / f"rank-{rank}.json", "")["comparison"]["relative"] for rank in range(2)]
    assert found == pytest.approx([0, 2], abs=0.02)


def test_a_rank_holds_and_plans_to_read_its_share(found):
    one, two = found["moebius 1"]["load"], found["moebius ep"]["load"]
    assert one["weight_bytes"] == one["share_bytes"] == share_bytes(CONFIG, 1)
    assert two["weight_bytes"] == two["share_bytes"] < one["weight_bytes"]
    assert two["planned_bytes"] <= two["share_bytes"]


def test_tokens_a_second_are_those_of_the_whole_job(found):
    for way, batches in (("moebius 1", 1), ("moebius ep", 2), ("moebius ep shared", 1)):
        prefill = found[way]["prefill"]
        assert prefill["tokens_a_second"] * prefill["seconds"] == pytest.approx(16 * batches)


def test_table_and_picture_show_what_was_measured(found, tmp_path):
    report = report_of([*found.values(), {"way": "transformers tp", "ranks": 2, "reason": "load: no"}])
    shown = table(report)
    assert all(way in shown for way in found)
    assert "reason: load: no" in shown
    write_report(report, tmp_path / "report", draw_parallel)
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]


def test_every_exchange_is_timed_by_itself(folder):
    first, second = run_ranks(2, exchanged, folder)
    assert [row["exchange"] for row in first] == ["all_reduce", "gather_scatter", "all_to_all"] * 2
    assert [row["tokens"] for row in second] == [8] * 3 + [16] * 3
    assert all(seconds > 0 for row in first + second for seconds in row["seconds"])


# --- put together ----------------------------------------------------------------------------------------------------


def test_the_slowest_rank_counts_and_of_these_the_median():
    launch = [{"prefill_seconds": [1.0, 4.0, 2.0], "reason": ""}, {"prefill_seconds": [3.0, 1.0, 1.0], "reason": ""}]
    row = row_of("moebius ep", [launch])
    assert row["prefill"] == {"seconds": 3.0, "tokens_a_second": 2 * 16 / 3.0}


def test_what_came_before_a_failure_stays_and_the_rank_that_failed_says_why():
    ended = {"prefill_seconds": [1.0], "stage": "decode", "reason": "decode: ended with 1"}
    failed = {**ended, "error": "ValueError: no", "reason": "decode: ValueError: no"}
    row = row_of("moebius ep", [[ended, failed]])
    assert row["prefill"]["seconds"] == 1.0
    assert "step_seconds" not in row
    assert row["reason"] == "decode: ValueError: no"


def test_a_wrong_answer_is_an_error_and_a_peers_is_not():
    wrong = {"relative": float("inf"), "largest": 1.0, "same_token": 0.0}
    parallel.refuse_wrong({"rows": [{"way": "transformers ep", "comparison": wrong}]})
    with pytest.raises(MoebiusError, match="moebius ep: logits differ"):
        parallel.refuse_wrong({"rows": [{"way": "moebius ep", "comparison": wrong}]})


def test_a_nan_is_as_far_as_can_be():
    expected = torch.eye(3)
    assert difference(expected, expected)["relative"] == 0
    assert difference(expected.clone().fill_(float("nan")), expected)["relative"] == float("inf")
    assert difference(expected.flip(0), expected)["same_token"] == pytest.approx(1 / 3)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pass", ""),
        ("print('all is well')", ""),
        ("raise ValueError('not this one')", "ended with 1: ValueError: not this one"),
        ("raise SystemExit(7)", "ended with 7: nothing was said"),
    ],
)
def test_how_a_launch_ended(source, said):
    assert parallel.launch([sys.executable, "-c", source], os.environ, 30.0) == said


def test_the_last_words_of_a_launch_end_between_words_and_say_that_they_go_on():
    source = f"raise ValueError({'one two three ' * 100!r})"
    said = parallel.launch([sys.executable, "-c", source], os.environ, 30.0)
    assert 500 < len(said) < 700
    assert said.endswith((" one [...]", " two [...]", " three [...]"))


def test_help_says_what_transformers_ways_want():
    from moebius.cli.bench import bench

    said = " ".join(CliRunner().invoke(bench, ["parallel", "--help"]).output.split())
    assert "transformers' ways want transformers, and on GPUs or on several ranks accelerate too" in said


def test_a_launch_that_hangs_is_ended():
    asleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert parallel.launch(asleep, os.environ, 0.5).startswith("no end within 0.5 s")


def test_a_rank_that_wrote_nothing_has_a_reason_too(tmp_path):
    assert parallel.found_by(tmp_path / "rank-0.json", "ended with 1: no")["reason"] == "start: ended with 1: no"


def test_launches_are_not_told_of_a_job_that_this_process_is_in(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    passed = parallel.environment("cpu")
    assert not [name for name in passed if name.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_", "TORCHELASTIC_"))]
    assert (passed["NCCL_NVLS_ENABLE"], passed["CUDA_VISIBLE_DEVICES"]) == ("0", "")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (parallel.Request(device="cpu", ways=("moebius 1", "fastest")), "'fastest'; known: moebius 1, "),
        (parallel.Request(device="tpu"), "'tpu'; known: cuda, cpu"),
        (parallel.Request(ranks=1000), "1000 ranks need a GPU each, found "),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(request_, message):
    with pytest.raises(ArgumentError, match=message):
        parallel.run(request_, print)


def test_a_path_in_the_reports_command_is_its_last_name(monkeypatch):
    from moebius.cli.bench import _command

    monkeypatch.setattr(sys, "argv", ["moebius", "bench", "parallel", "--folder", "/a/b/model", "--out=/a/c/report"])
    assert _command() == "moebius bench parallel --folder model --out=report"


@pytest.mark.slow
def test_the_command_as_a_whole_under_torchrun(folder, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moebius.cli", "bench"]
    options = ["--device", "cpu", "--folder", str(folder), "--tokens", "32", "--cached", "8", "--repeats", "1"]
    ways = ["--way", "moebius 1", "--way", "moebius ep", "--way", "transformers 1", "--way", "exchanges"]
    out = ["--out", str(tmp_path / "report"), "--quiet"]
    ended = subprocess.run(
        [sys.executable, *command, "parallel", *options, *ways, *out], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("moebius ep") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["way"] for row in report["rows"]] == ["moebius 1", "moebius ep", "transformers 1"]
    assert not [row for row in report["rows"] if "reason" in row]
    assert len(report["exchanges"]) == 6


@pytest.mark.slow
def test_a_rank_that_hangs_says_where(folder, tmp_path):
    job = job_for("moebius ep", folder, tmp_path)
    source = (
        "import sys, time; from moebius.bench import parallel_worker as worker;"
        "worker.measure = lambda job, findings: findings.stage('decode').__enter__() or time.sleep(60);"
        "worker.main(sys.argv[1])"
    )
    given = json.dumps({**asdict(job), "seconds": 1.0})
    said = parallel.launch([sys.executable, "-c", source, given], parallel.environment("cpu"), 60.0)
    assert parallel.found_by(tmp_path / "rank-0.json", said)["reason"].startswith("decode: ended with 1: Timeout")
