"""The feed-forward layer, plain and gated."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.config import TransformerConfig
from meristem.shapes import Float, Tensor


def _silu(x: Tensor) -> Tensor:
    """SiLU whose last bit does not depend on where an element stands.

    On the CPU, torch's own takes another exponential for the elements left over at the end of a thread's share,
    so a row would round by the number of rows beside it.
    """
    if torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32:
        return F.silu(x)
    return torch.div(x, (-x).exp_().add_(1.0))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": _silu}


class FeedForwardLayer(nn.Module):
    """Out, activation, in; gated, the input map holds the gate's rows first, then the value's."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        part = config.feedforward
        self.activation = ACTIVATIONS[part.activation]
        self.is_gated = part.is_gated
        self.up = nn.Linear(config.width, part.width * (2 if part.is_gated else 1), bias=part.in_bias)
        self.down = nn.Linear(part.width, config.width, bias=part.out_bias)
        self.dropout = nn.Dropout(part.dropout)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        hidden_TF = self.up(x)
        if self.is_gated:
            gate_TF, value_TF = hidden_TF.chunk(2, dim=-1)
            # contiguous: over strided rows the CPU's GELU rounds by where a row stands
            hidden_TF = self.activation(gate_TF.contiguous()) * value_TF
        else:
            hidden_TF = self.activation(hidden_TF)
        return self.down(self.dropout(hidden_TF))
