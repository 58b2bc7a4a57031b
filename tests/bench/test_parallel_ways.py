"""The ways that the parallel suite compares: what a peer that cannot run says."""

import pytest

from moebius.bench import parallel_ways


def test_a_peers_reason_is_told_to_its_end(monkeypatch):
    wants = "Using a `device_map`, " + "or so, " * 18 + "requires `accelerate`. Install it"

    def refused(load, spelling):
        raise ValueError(wants)

    monkeypatch.setattr(parallel_ways, "_distributed", refused)
    with pytest.raises(ValueError, match=r"requires `accelerate`\. Install it$"):
        parallel_ways._peer(parallel_ways.WAYS["transformers tp"], lambda: None, 2)
