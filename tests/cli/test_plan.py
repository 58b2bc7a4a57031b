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
