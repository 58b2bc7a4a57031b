"""The loading suite, run on a tiny checkpoint: it measures what it says, each way in a process of its own."""

import json

import pytest
from safetensors import safe_open

from moebius import ArgumentError, AutoModelForCausalLM
from moebius.bench import load
from moebius.bench.checkpoints import write_checkpoint
from moebius.bench.reports import draw_speeds, write_report
from tests.families import tiny_config
from tests.model_folders import ids_for, logits, open_in_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench") / "model"
    nbytes = write_checkpoint(place, tiny_config("qwen3_moe", torch_dtype="bfloat16"), max_shard_bytes=100_000)
    assert nbytes == load.warm(place) - sum(header_bytes(path) for path in place.glob("*.safetensors"))
    return place


def header_bytes(path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_what_is_written_is_laid_out_as_transformers_does_and_opens_in_both(folder):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == sorted(file.keys())
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = ids_for(ours)
    assert (open_in_transformers(folder)(ids).logits - logits(ours, ids)).abs().max() < 5e-5


@pytest.mark.slow
def test_every_way_loads_the_same_weights_and_is_reported(folder, tmp_path):
    said: list[str] = []
    report = load.run(folder, "cpu", "auto", 1, list(load.WAYS), said.append)
    assert len(said) == len(load.WAYS)
    checksums = {name: runs[0]["checksum"] for name, runs in report["runs"].items()}
    assert len({checksums[name] for name in load.PLAIN}) == 1
    assert checksums["moebius int4"] == checksums["moebius int4 after"] != checksums["moebius"]
    assert all(name in load.table(report) for name in load.WAYS)
    write_report(report, tmp_path / "report", draw_speeds)
    assert json.loads((tmp_path / "report.json").read_text())["ways"] == report["ways"]


def test_an_unknown_way_is_refused_before_anything_runs(folder):
    with pytest.raises(ArgumentError, match="'fastest'; known: moebius, "):
        load.run(folder, "cpu", "auto", 1, ["moebius", "fastest"], print)
