"""A head that compares the two ends of a sequence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from meristem.model.config import TransformerConfig
from meristem.model.heads import Head, Readout
from meristem.model.outputs import HeadRequest
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, PackedBatch


@dataclass(frozen=True, kw_only=True)
class EndsReadout(Readout):
    """Classes of a record, from its first and its last row."""

    kind: ClassVar[str] = "ends"

    def build(self, config: TransformerConfig) -> "EndsHead":
        return EndsHead(config.width, self.num_outputs)


class EndsHead(Head):
    """Logits `[S, C]` of each sequence."""

    def __init__(self, width: int, num_outputs: int):
        super().__init__()
        self.out = nn.Linear(2 * width, num_outputs)

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Float[Tensor, "S C"]:
        bounds = hidden.layout.cu_seqlens[: hidden.layout.num_sequences + 1].long()
        ends = [hidden.final.index_select(0, rows) for rows in (bounds[:-1], bounds[1:] - 1)]
        return self.out(torch.cat(ends, dim=1))
