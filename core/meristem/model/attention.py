"""The attention layer: projections, positions, a kernel, the way out."""

from dataclasses import dataclass

from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.kernels import attend, attend_reference
from meristem.model.position import PositionLayer, Tables
from meristem.shapes import Float, Tensor
from meristem.types import Layout


@dataclass(frozen=True)
class Context:
    """What every layer of a stack shares within one batch.

    Attributes:
        layout: of the rows.
        position: turns queries and keys.
        tables: its tables for these rows.
    """

    layout: Layout
    position: PositionLayer
    tables: Tables


class AttentionLayer(nn.Module):
    """Multi-head self-attention over packed sequences.

    Queries, keys and values come from one product; the rows of its weight are queries, keys, values in
    this order, each head after head.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config.attention
        self.num_heads, self.num_kv_heads = config.attention.num_heads, config.num_kv_heads
        self.head_width = config.head_width
        out = (self.num_heads + 2 * self.num_kv_heads) * self.head_width
        self.qkv = nn.Linear(config.width, out, bias=self.config.qkv_bias)
        self.out = nn.Linear(self.num_heads * self.head_width, config.width, bias=self.config.out_bias)

    def forward(
        self, x: Float[Tensor, "T D"], context: Context, maps: list[Tensor] | None = None
    ) -> Float[Tensor, "T D"]:
        """Attend within each sequence.

        Args:
            maps: a list that attention weights `[H, n, n]` of each sequence are appended to; the slow reference
                kernel computes them.
        """
        heads_TXE = self.qkv(x).unflatten(-1, (-1, self.head_width))
        q_THE, k_TKE, v_TKE = heads_TXE.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_THE = context.position.turn(q_THE, context.tables)
        k_TKE = context.position.turn(k_TKE, context.tables)
        layout, pattern = context.layout, self.config.pattern
        if maps is not None:
            o_THE, weights = attend_reference(q_THE, k_TKE, v_TKE, layout, layout, pattern)
            maps.extend(weights)
        else:
            dropout = self.config.dropout if self.training else 0.0
            o_THE = attend(q_THE, k_TKE, v_TKE, layout, layout, pattern, dropout=dropout)
        return self.out(o_THE.flatten(1))
