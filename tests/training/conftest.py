import pytest
import torch

from moebius.layers.decoder import Decoder
from tests.training.models import tiny_config


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder(tiny_config())
    decoder.init_weights(torch.Generator().manual_seed(0))
    return decoder
