"""The torch form of each activation in config.py, and its derivative.  S rows, I intermediate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.config import Activation, ClampedSwiGLU, SwiGLU


def gated_activation(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I], in their dtype."""
    match activation:
        case SwiGLU():
            return F.silu(gate) * up
        case ClampedSwiGLU(alpha, limit):
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def gated_activation_gradient(activation: Activation, gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [S, 2I], gate first, the activation's gradient [S, I] -> the activation [S, I], the gradient [S, 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case SwiGLU():
            activated = F.silu(gate)
            gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
            return activated * up, torch.cat((gate_grad, grad * activated), dim=-1)
        case ClampedSwiGLU():
            return _clamped_swiglu_gradient(activation, gate, up, grad)


def _clamped_swiglu_gradient(
    activation: ClampedSwiGLU, gate: Tensor, up: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """With g sigmoid(alpha g) = silu(alpha g) / alpha.  Zero where clamped, and not on the bound itself."""
    alpha, limit = activation.alpha, activation.limit
    inner_gate, inner_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    activated = inner_gate * torch.sigmoid(alpha * inner_gate)
    gate_grad = torch.ops.aten.silu_backward(grad * (inner_up + 1), alpha * inner_gate)
    gate_grad, up_grad = gate_grad.where(gate <= limit, 0), (grad * activated).where(up.abs() <= limit, 0)
    return (inner_up + 1) * activated, torch.cat((gate_grad, up_grad), dim=-1)
