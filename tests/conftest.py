"""What every test starts from: one intra-op thread (as fast on tiny models, and steadier), torch's seed at zero, and
transformers' checkpoints, each made once.
"""

import pytest
import torch

from tests.families import make_oracle, save_oracle


@pytest.fixture(autouse=True)
def _steady_torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family -> (oracle, its folder in the hub's layout, three shards or more)."""
    made = {}

    def get(family):
        if family not in made:
            oracle = make_oracle(family)
            folder = tmp_path_factory.mktemp("hub") / family
            made[family] = oracle, save_oracle(oracle, folder, max_shard_size="100kB")
        return made[family]

    return get
