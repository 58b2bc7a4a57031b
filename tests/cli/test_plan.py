"""plan: over which devices a model would be split."""

import json

import torch

from moebius.auto import open_checkpoint
from moebius.checkpoint import loading
from moebius.placement import parts_of


def test_plan_shows_the_shares_of_devices(moebius, model, monkeypatch):
    embedding, layer, *_ = parts_of(open_checkpoint(model).plan).values()
    free = {"cuda:0": (1 << 30) + embedding, "cuda:1": (1 << 30) + layer, "cpu": 1 << 40}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(loading, "_free_bytes", lambda device: free[str(device)])
    ended = moebius("plan", model, "--device", "auto")
    assert ended.code == 0
    assert "on cuda:0: model.embed_tokens\n" in ended.out
    assert "on cuda:1: model.layers.0\n" in ended.out
    assert "on cpu: model.layers.1 to lm_head\n" in ended.out
    assert ended.out.endswith("fits on cuda:0, cuda:1, cpu\n")
    report = json.loads(moebius("plan", model, "--device", "auto", "--json").out)
    assert report["device_map"]["model.layers.0"] == 1
    assert list(report["peak_bytes_of_devices"]) == ["cuda:0", "cuda:1", "cpu"]


def test_plan_shows_what_each_rank_reads_and_holds(moebius, model):
    plan = open_checkpoint(model).plan
    ended = moebius("plan", model, "--ranks", "3")
    assert [line[:8] for line in ended.out.splitlines() if line.startswith("rank")] == [
        "rank 0: ",
        "rank 1: ",
        "rank 2: ",
    ]
    report = json.loads(moebius("plan", model, "--ranks", "3", "--json").out)["ranks"]
    experts = sum(target.nbytes for name, target in plan.targets.items() if ".experts." in name)
    dense = plan.target_bytes - experts
    assert sum(rank["holds"] for rank in report) == experts + 3 * dense
    assert report[0]["holds"] >= report[2]["holds"] > dense
    assert [rank["reads"] for rank in report] == [rank["holds"] for rank in report]  # the same dtype on both sides
    (alone,) = json.loads(moebius("plan", model, "--ranks", "1", "--json").out)["ranks"]
    assert alone == {"reads": plan.bytes_to_read, "holds": plan.target_bytes}
    assert moebius("plan", model, "--ranks", "0").code == 2
