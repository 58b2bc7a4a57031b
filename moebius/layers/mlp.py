"""The dense feed-forward.  H hidden, I intermediate."""

from torch import Tensor, nn

from moebius.config import DenseMlp
from moebius.experts.activations import gated_activation


class Mlp(nn.Module):
    """down(activation(gate(x), up(x))): [..., H] -> [..., H]."""

    def __init__(self, config: DenseMlp, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(
            gated_activation(self.activation, self.gate_proj(hidden_states), self.up_proj(hidden_states))
        )
