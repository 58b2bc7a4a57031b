"""Saving from a card: the bytes that the host would write, after all that is under way on the caller's stream."""

import pytest
import torch

from moebius import checkpoint
from moebius.checkpoint import fetching, saving, writing
from tests.checkpoint.folders import write
from tests.checkpoint.test_ways import plan_of, stored

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("staging", [1000, 1 << 20])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_was_loaded_to_a_card_is_written_as_it_was(tmp_path, monkeypatch, threads, staging):
    monkeypatch.setattr(saving, "default_readers", lambda: threads)
    monkeypatch.setattr(writing, "STAGING_BYTES", staging)
    monkeypatch.setattr(writing, "WRITE_BYTES", staging)
    source = write(tmp_path / "source", stored(), 3)
    plan = plan_of(source)
    checkpoint.save(plan, checkpoint.load(plan, device="cuda"), tmp_path / "copy", checksums=True)
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_a_lane_waits_for_work_on_the_stream_that_it_was_made_on():
    stream = torch.cuda.Stream()
    tensor = torch.zeros(fetching.WRITE_BYTES // 4, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tensor += 7
        lane = fetching.CudaLane(torch.device("cuda"))
    assert set(lane.host(tensor).cast("f")) == {7.0}
