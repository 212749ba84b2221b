"""The feed-forward layer, plain and gated."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.config import FeedForward
from meristem.shapes import Float, Tensor


def _is_exact(x: Tensor) -> bool:
    """Whether the last bit of an element must not depend on where it stands.

    On the CPU, torch's own SiLU, sigmoid and tanh GELU take other functions for the elements left over at the end of a
    thread's share, so a row would round by the number of rows beside it.
    """
    return not torch.is_grad_enabled() and x.is_cpu and x.dtype == torch.float32


def _silu(x: Tensor) -> Tensor:
    return torch.div(x, (-x).exp_().add_(1.0)) if _is_exact(x) else F.silu(x)


def _quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid (Hendrycks 2016, section 2)."""
    if _is_exact(x):
        return torch.div(x, (-1.702 * x).exp_().add_(1.0))
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks 2016, section 2)."""
    if _is_exact(x):
        inner = (x * x).mul_(0.044715).add_(1.0).mul_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": _silu,
}


def activate(
    hidden_TF: Float[Tensor, "T F_up"], activation: Callable[[Tensor], Tensor], is_gated: bool
) -> Float[Tensor, "T F"]:
    """From the way up to the way down; gated, the first half of the features gates the second."""
    if not is_gated:
        return activation(hidden_TF)
    gate_TF, value_TF = hidden_TF.chunk(2, dim=-1)
    # contiguous: over strided rows the CPU's GELU rounds by where a row stands
    return activation(gate_TF.contiguous()) * value_TF


class FeedForwardLayer(nn.Module):
    """Out, activation, in; gated, the input map holds the gate's rows first, then the value's.

    Args:
        width: of the trunk.
        part: its config.
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
