"""The torch form of each activation in config.py.  I intermediate."""

import torch.nn.functional as F
from torch import Tensor

from moebius.config import Activation, SwiGLU


def gated_activation(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I], in their dtype."""
    match activation:
        case SwiGLU():
            return F.silu(gate) * up
