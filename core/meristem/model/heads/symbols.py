"""The head that predicts symbols."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from meristem.errors import ConfigError
from meristem.model.config import TransformerConfig
from meristem.model.embed import EmbeddingLayer
from meristem.model.feedforward import ACTIVATIONS
from meristem.model.heads.cross_entropy import linear_cross_entropy
from meristem.model.heads.head import Head, HeadSpec
from meristem.model.init import init_weights
from meristem.model.norm import build_norm
from meristem.model.outputs import HeadRequest
from meristem.model.pool import PoolLayer
from meristem.shapes import Bool, Float, Int, Tensor
from meristem.types import Hidden, PackedBatch, Term


@dataclass(frozen=True, kw_only=True)
class Symbols(HeadSpec):
    """The symbol of each row. The layers of this head are part of the architecture (`head`)."""

    kind: ClassVar[str] = "symbols"

    def build(self, config: TransformerConfig) -> "SymbolHead":
        if config.head is None:
            raise ConfigError("a head of symbols must be described (architecture.head); got none")
        return SymbolHead(config)


class SymbolLoss(NamedTuple):
    """The loss of the rows that were asked for.

    Attributes:
        total: sum of the losses (nats), with gradient.
        nats: loss of each row, without smoothing and without gradient.
        is_hit: whether the target is the likeliest symbol of the row.
        rows: indices of the rows in the pack, as in the request.
        targets: target symbol of each row.
    """

    total: Float[Tensor, ""]
    nats: Float[Tensor, "M"]
    is_hit: Bool[Tensor, "M"]
    rows: Int[Tensor, "M"]
    targets: Int[Tensor, "M"]

    @property
    def term(self) -> Term:
        """The sum, and the number of rows that it is counted over."""
        return Term(self.total, torch.tensor(float(len(self.rows)), device=self.total.device))

    @property
    def figures(self) -> Float[Tensor, "M 2"]:
        """Two figures of each row for metrics: 1 if the prediction is right, else 0; the unsmoothed loss in nats."""
        return torch.stack([self.is_hit.float(), self.nats], dim=1)


class SymbolHead(Head):
    """Predicts the symbol of each row: dense, activation, norm, map onto the vocabulary (`config.head`).

    Its outputs are logits, `[T, V]` of all rows or `[M, V]` of those asked for; with targets, a `SymbolLoss`.
    """

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

    def tie(self, embedding: EmbeddingLayer, pool: PoolLayer | None) -> None:
        self.shared = (embedding.symbols,) if self.out is None else ()

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Float[Tensor, "M V"] | SymbolLoss:
        features_MD, weight_VD, targets_M = self.features(hidden, request), self.weight, request.targets
        if targets_M is None:
            return F.linear(features_MD, weight_VD, self.bias)
        assert request.rows is not None, "targets are those of some rows"
        found = linear_cross_entropy(features_MD, weight_VD, self.bias, targets_M, request.label_smoothing)
        return SymbolLoss(*found, request.rows, targets_M)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """Weight of the map onto the vocabulary: its own, or the embedding table."""
        weight = self.shared[0].weight if self.out is None else self.out.weight
        assert isinstance(weight, Tensor)
        return weight

    def features(self, hidden: Hidden, request: HeadRequest) -> Float[Tensor, "M D"]:
        """The input of the map onto the vocabulary, for the requested rows alone.

        With a large vocabulary the map costs as much as several blocks.
        """
        rows = hidden.final if request.rows is None else hidden.final.index_select(0, request.rows)
        rows = rows.to(self.weight.dtype)  # of a trunk in another precision
        if self.config.activation is not None:
            rows = self.norm(self.activation(self.dense(rows)))
        return rows if self.config.scale == 1.0 else rows * self.config.scale

    def init_own_weights(self, _: object) -> None:
        """Set the bias of each symbol to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
