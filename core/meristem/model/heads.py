"""Heads on the trunk: symbols, labels of records and of tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.config import Prefix, TransformerConfig
from meristem.model.feedforward import ACTIVATIONS
from meristem.model.init import init_weights
from meristem.model.norm import build_norm
from meristem.model.pool import PoolLayer, build_pool
from meristem.model.readout import Readout
from meristem.shapes import Float, Tensor


class SymbolHead(nn.Module):
    """Predicts the symbol of each row: dense, activation, norm, map onto the vocabulary (`config.head`)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        assert config.head is not None, "a symbol head needs config.head"
        self.config = config.head
        vocab_size = config.embedding.vocab_size
        if config.head.activation is not None:
            self.activation = ACTIVATIONS[config.head.activation]
            self.dense = nn.Linear(config.width, config.width, bias=config.head.dense_bias)
            self.norm = build_norm(config.norm, config.width)
        self.out = None if config.head.is_tied else nn.Linear(config.width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if config.head.bias else None
        init_weights(self, config.init, config.num_layers)

    def forward(self, rows: Float[Tensor, "M D"], table: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        """Logits of the rows given; score only those that have a target.

        Args:
            table: the embedding table, used where the head is tied to it.
        """
        return F.linear(self.features(rows), *self.onto_symbols(table))

    def onto_symbols(self, table: Float[Tensor, "V D"]) -> tuple[Float[Tensor, "V D"], Float[Tensor, "V"] | None]:
        """Weight and bias of the map onto the vocabulary."""
        return table if self.out is None else self.out.weight, self.bias

    def features(self, rows: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """What is mapped onto the vocabulary."""
        if self.config.activation is not None:
            rows = self.norm(self.activation(self.dense(rows)))
        return rows if self.config.scale == 1.0 else rows * self.config.scale

    def init_own_weights(self, _: object) -> None:
        """Start without a preference for any symbol."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LabelHead(nn.Module):
    """Predicts what a `Readout` says, from one vector a record or from each row.

    Attributes:
        pool: how rows become vectors; None at token level, and where the model's own pool does it.
    """

    def __init__(self, config: TransformerConfig, readout: Readout):
        super().__init__()
        self.readout = readout
        is_pooled = readout.level == "record"
        pool = readout.pool if is_pooled else None
        self.pool = None if pool is None else build_pool(pool, config)
        own = config.pool if is_pooled and pool is None else None
        width = config.width
        if is_pooled and isinstance(pool or own, Prefix):
            width = PoolLayer(pool or own, width).width  # type: ignore[arg-type]
        self.standardise = Standardise(width) if readout.is_standardised else None
        self.hidden = nn.Linear(width, readout.hidden_width) if readout.hidden_width else None
        self.dropout = nn.Dropout(readout.dropout)
        self.out = nn.Linear(readout.hidden_width or width, readout.num_outputs)
        init_weights(self, config.init, config.num_layers)

    @property
    def is_pooled(self) -> bool:
        """Whether it reads one vector a record."""
        return self.readout.level == "record"

    def forward(self, rows: Float[Tensor, "R W"]) -> Float[Tensor, "R C"]:
        """Logits or scaled values, of one vector a record or of one a token."""
        if self.standardise is not None:
            rows = self.standardise(rows)
        if self.hidden is not None:
            rows = F.gelu(self.hidden(rows))
        return self.out(self.dropout(rows))


class Standardise(nn.Module):
    """Batch normalisation without its affine part, as linear probes have it (He 2022, arXiv 2111.06377).

    For records that differ little, such as the mutants of one protein: their pooled vectors share almost
    everything, and a head would first have to amplify what they do not share. In training the figures are
    those of the pack, and running ones where a pack holds one record; in evaluation always the running ones.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        uses_pack = self.training and len(rows) > 1
        # differences between mutants are small against the vectors: eps must be smaller still
        return F.batch_norm(rows, self.mean, self.var, None, None, uses_pack, self.momentum, eps=1e-10)


class ContactHead(nn.Module):
    """Contacts of a sequence from its attention maps: a logistic regression on all layers and heads.

    Rao 2020 (doi 10.1101/2020.12.15.422761): maps are symmetrised, corrected for the average product
    (Dunn 2008), and weighed by one coefficient a map.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.regression = nn.Linear(config.num_layers * config.attention.num_heads, 1)
        init_weights(self, config.init, config.num_layers)

    def forward(self, maps: Sequence[Float[Tensor, "H n n"]]) -> Float[Tensor, "n n"]:
        """Logits of contact between each two tokens.

        Layer by layer, so that only the maps themselves are held for all of them.

        Args:
            maps: attention weights of each layer, rows and columns of special tokens left out.
        """
        weights_LH = self.regression.weight.view(len(maps), -1)
        logits_nn: Tensor = self.regression.bias
        for weights_H, maps_Hnn in zip(weights_LH, maps):
            corrected_Hnn = correct_average_product(maps_Hnn + maps_Hnn.transpose(1, 2))
            logits_nn = logits_nn + torch.einsum("h,hmn->mn", weights_H, corrected_Hnn)
        return logits_nn


def correct_average_product(maps: Float[Tensor, "X n n"]) -> Float[Tensor, "X n n"]:
    """Take the background of each row and column from symmetric maps (APC; Dunn 2008, eq. 3)."""
    rows_Xn1, columns_X1n = maps.sum(-1, keepdim=True), maps.sum(-2, keepdim=True)
    # maps of nothing but zeros stay so
    total_X11 = maps.sum((-1, -2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return maps - rows_Xn1 * columns_X1n / total_X11
