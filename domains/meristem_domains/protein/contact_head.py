"""The head that predicts contacts from attention maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from meristem.framing import payload_parts
from meristem.model.config import TransformerConfig
from meristem.model.heads import Head, HeadSpec
from meristem.model.init import init_weights
from meristem.model.outputs import HeadRequest
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout, PackedBatch

CONTACTS = "contacts"
"""Name of the head in models that have it."""


@dataclass(frozen=True, kw_only=True)
class Contacts(HeadSpec):
    """The head that predicts which residues touch each other in the folded protein."""

    kind: ClassVar[str] = "contacts"

    def build(self, config: TransformerConfig) -> "ContactHead":
        return ContactHead(config)

    def by_sequence(self, outputs: Any, layout: Layout) -> Sequence[Tensor]:
        """Probabilities of contact, `[n, n]` for each sequence."""
        return [logits_nn.sigmoid() for logits_nn in outputs]


class ContactHead(Head):
    """Predicts contacts by logistic regression on the attention maps of all layers and heads.

    Source: Rao 2020, doi 10.1101/2020.12.15.422761.

    Maps are symmetrised, corrected for the average product (Dunn 2008), and summed with one weight each. The output is
    one map `[n, n]` of logits for each sequence, over the tokens of its payload.
    """

    needs_attentions = True

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.regression = nn.Linear(config.num_layers * config.attention.num_heads, 1)
        init_weights(self, config.init, config.num_layers)

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> list[Float[Tensor, "n n"]]:
        return [self._logits(maps) for maps in payload_maps(hidden)]

    def _logits(self, maps: Sequence[Float[Tensor, "H n n"]]) -> Float[Tensor, "n n"]:
        """Logits of one sequence, layer by layer: no other array of the size of all maps is held."""
        weights_LH = self.regression.weight.view(len(maps), -1)
        logits_nn: Tensor = self.regression.bias
        for weights_H, maps_Hnn in zip(weights_LH, maps):
            maps_Hnn = maps_Hnn.to(weights_H.dtype)  # of a trunk in another precision
            corrected_Hnn = correct_average_product(maps_Hnn + maps_Hnn.transpose(1, 2))
            logits_nn = logits_nn + torch.einsum("h,hmn->mn", weights_H, corrected_Hnn)
        return logits_nn


def payload_maps(hidden: Hidden) -> list[list[Float[Tensor, "H n n"]]]:
    """Attention between the tokens of each payload: for each sequence, the maps of each layer that was kept."""
    return [
        [hidden.attentions[layer][index][:, rows][:, :, rows] for layer in sorted(hidden.attentions)]
        for index, rows in enumerate(payload_parts(hidden.layout))
    ]


def correct_average_product(maps: Float[Tensor, "X n n"]) -> Float[Tensor, "X n n"]:
    """Subtract the background of each row and column from symmetric maps (APC; Dunn 2008, eq. 3)."""
    rows_Xn1, columns_X1n = maps.sum(-1, keepdim=True), maps.sum(-2, keepdim=True)
    # maps of nothing but zeros stay so
    total_X11 = maps.sum((-1, -2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return maps - rows_Xn1 * columns_X1n / total_X11
