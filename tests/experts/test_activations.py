"""Each activation's derivative by hand is autograd's of its forward, on the bounds of a clamp too."""

import pytest
import torch

from moebius.config import Activation, ClampedSwiGLU, SwiGLU
from moebius.experts.activations import gated_activation, gated_activation_gradient

EDGES = [-9.0, -7.0, -1.0, 0.0, 1.0, 7.0, 9.0]


def every_pair() -> torch.Tensor:
    """[S, 2]: each gate beside each up, the bounds of the clamp among them."""
    return torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))


@pytest.mark.parametrize("activation", [SwiGLU(), ClampedSwiGLU(), ClampedSwiGLU(alpha=1.0, limit=1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_by_hand_is_autograds(activation: Activation, dtype):
    gate_up = torch.cat([every_pair(), torch.randn(100, 2) * 5]).to(dtype).requires_grad_()
    grad = torch.randn(len(gate_up), 1).to(dtype)
    output = gated_activation(activation, *gate_up.chunk(2, dim=-1))
    (expected,) = torch.autograd.grad(output, gate_up, grad)
    activated, found = gated_activation_gradient(activation, gate_up.detach(), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(activated, output.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found == 0, expected == 0)  # clamped in the one, clamped in the other


def test_the_clamped_form_in_numbers():
    gate, up = torch.tensor([8.0, 7.0, -8.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 8.0, -8.0, -1.0])

    def swish(number: float) -> torch.Tensor:
        return number * torch.sigmoid(torch.tensor(1.702 * number))

    expected = torch.stack([swish(7), swish(7), swish(-8), 8 * swish(1), -6 * swish(1), 0 * swish(1)])
    torch.testing.assert_close(gated_activation(ClampedSwiGLU(), gate, up), expected)


def test_a_gate_is_not_clamped_from_below():
    gate = torch.tensor([-9.0], requires_grad=True)
    gated_activation(ClampedSwiGLU(), gate, torch.zeros(1)).sum().backward()
    assert gate.grad is not None
    assert gate.grad.ne(0).all()
