"""The torch form of each activation in config.py, and its derivative.  S rows, I intermediate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.config import Activation, SwiGLU


def gated_activation(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I], in their dtype."""
    match activation:
        case SwiGLU():
            return F.silu(gate) * up


def gated_activation_gradient(activation: Activation, gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [S, 2I], gate first, the activation's gradient [S, I] -> the activation [S, I], the gradient [S, 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case SwiGLU():
            activated = F.silu(gate)
            gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
            return activated * up, torch.cat((gate_grad, grad * activated), dim=-1)
