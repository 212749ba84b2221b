"""The feed-forward layer, plain and gated."""

from collections.abc import Callable

from torch import nn
from torch.nn import functional as F

from meristem.model import exact
from meristem.model.config import FeedForward
from meristem.shapes import Float, Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": exact.gelu_tanh,
    "quick_gelu": exact.quick_gelu,
    "relu": F.relu,
    "silu": exact.silu,
}


def activate(
    hidden_TF: Float[Tensor, "T F_up"], activation: Callable[[Tensor], Tensor], is_gated: bool
) -> Float[Tensor, "T F"]:
    """Apply the activation between the two maps; if gated, the first half of the features gates the second."""
    if not is_gated:
        return activation(hidden_TF)
    gate_TF, value_TF = hidden_TF.chunk(2, dim=-1)
    return activation(gate_TF.contiguous()) * value_TF  # contiguous: see exact.py


class FeedForwardLayer(nn.Module):
    """A linear map up, an activation, a linear map down.

    If gated, the rows of the map up are those of the gate, then those of the value.
    """

    def __init__(self, width: int, part: FeedForward):
        super().__init__()
        self.activation = ACTIVATIONS[part.activation]
        self.is_gated = part.is_gated
        self.up = nn.Linear(width, part.width * (2 if part.is_gated else 1), bias=part.in_bias)
        self.down = nn.Linear(part.width, width, bias=part.out_bias)
        self.dropout = nn.Dropout(part.dropout)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.dropout(activate(self.up(x), self.activation, self.is_gated)))
