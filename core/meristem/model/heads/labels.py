"""The head that predicts a label of records or of tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from meristem.errors import ConfigError
from meristem.model.config import Mean, Pool, TransformerConfig
from meristem.model.embed import EmbeddingLayer
from meristem.model.exact import with_spare_rows
from meristem.model.heads.head import Head, HeadSpec
from meristem.model.init import init_weights
from meristem.model.outputs import HeadRequest
from meristem.model.pool import PoolLayer, build_pool
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout, PackedBatch


@dataclass(frozen=True, kw_only=True)
class Readout(HeadSpec):
    """One prediction from the trunk: a class or a value, for each record or for each token.

    Attributes:
        level: whether there is one prediction for each record or for each token.
        task: whether classes or values are predicted.
        classes: names of the classes in the order of the logits; empty for values.
        mean: mean of the training values for each output; predictions are `output * std + mean`.
        std: standard deviation of the training values for each output.
        pool: how the rows of a record become one vector; None for the model's own pool. Unused at token level.
        is_standardised: whether each feature is standardised by its running mean and deviation before the head.
        hidden_width: width of the hidden layer of the head; 0 for a linear head.
        dropout: dropout rate before the last map, in training.
    """

    kind: ClassVar[str] = "labels"

    name: str
    level: Literal["record", "token"] = "record"
    task: Literal["classification", "regression"] = "classification"
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pool: Pool | None = field(default_factory=Mean)
    is_standardised: bool = False
    hidden_width: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.task == "classification" and len(self.classes) < 2:
            raise ConfigError(f"label {self.name!r} must have two classes or more; got {list(self.classes)}")

    @property
    def num_outputs(self) -> int:
        """Number of outputs for each prediction."""
        return len(self.classes) if self.task == "classification" else len(self.mean)

    def build(self, config: TransformerConfig) -> "LabelHead":
        return LabelHead(config, self)

    def by_sequence(self, outputs: Any, layout: Layout) -> Sequence[Tensor]:
        """The outputs of each record, or those of its tokens."""
        return list(outputs) if self.level == "record" else super().by_sequence(outputs, layout)


def readouts_of(heads: Mapping[str, HeadSpec]) -> tuple[Readout, ...]:
    """The specs of label heads among those of all heads."""
    return tuple(spec for spec in heads.values() if isinstance(spec, Readout))


class LabelHead(Head):
    """Predicts the label that a `Readout` describes, from one vector for each record or from each row.

    Outputs are logits or standardised values: `[S, C]` for records, `[T, C]` for tokens.
    """

    def __init__(self, config: TransformerConfig, readout: Readout):
        super().__init__()
        self.readout = readout
        is_pooled = readout.level == "record"
        self.pool = build_pool(readout.pool, config) if is_pooled and readout.pool is not None else None
        pool = (readout.pool or config.pool) if is_pooled else None
        width = config.width if pool is None else PoolLayer(pool, config.width).width
        self.standardise = Standardise(width) if readout.is_standardised else None
        self.hidden = nn.Linear(width, readout.hidden_width) if readout.hidden_width else None
        self.dropout = nn.Dropout(readout.dropout)
        self.out = nn.Linear(readout.hidden_width or width, readout.num_outputs)
        init_weights(self, config.init, config.num_layers)

    def tie(self, embedding: EmbeddingLayer, pool: PoolLayer | None) -> None:
        if self.readout.level == "record" and self.pool is None:
            if pool is None:
                raise ConfigError(
                    f"label {self.readout.name!r} takes the model's own pool (pool: null), and it has none"
                )
            self.shared = (pool,)

    @property
    def num_first(self) -> int | None:
        pool = self._pool
        return None if pool is None else pool.num_first

    @property
    def _pool(self) -> PoolLayer | None:
        """What makes one vector of a record's rows; None at token level."""
        pool = self.shared[0] if self.shared else self.pool
        assert pool is None or isinstance(pool, PoolLayer)
        return pool

    def forward(self, hidden: Hidden, batch: PackedBatch, request: HeadRequest) -> Float[Tensor, "R C"]:
        assert request.targets is None, "a head of labels gives no loss"
        assert request.rows is None, "a head of labels gives all its outputs"
        pool = self._pool
        rows = hidden.final if pool is None else pool(hidden.final, hidden.layout)
        num_rows = len(rows)
        rows = rows.to(next((one.dtype for one in self.parameters()), rows.dtype))
        if request.rounds_alike:
            rows = with_spare_rows(rows)
        if self.standardise is not None:
            rows = self.standardise(rows)
        if self.hidden is not None:
            rows = F.gelu(self.hidden(rows))
        return self.out(self.dropout(rows))[:num_rows]


STANDARDISE_EPS = 1e-10
"""Added to a variance; the pooled vectors of mutants differ little, so it must be smaller still."""


class Standardise(nn.Module):
    """Batch normalisation without its affine part, as linear probes have it (He 2022, arXiv 2111.06377).

    For records that differ little, such as the variants of one text: their pooled vectors share almost
    everything, and a head would first have to amplify what they do not share. In training the figures are
    those of the pack, and running ones where a pack holds one record; in evaluation always the running ones. Running
    figures move at the end of a step, by the packs of all processes in their order.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self._seen: list[Tensor] = []

    def forward(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        if self.training:
            self._seen.append(rows.detach())
            if len(rows) > 1:
                return F.batch_norm(rows, None, None, None, None, True, eps=STANDARDISE_EPS)
        return F.batch_norm(rows, self.mean, self.var, eps=STANDARDISE_EPS)

    @torch.no_grad()
    def take_in(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Update the running figures with the packs seen since the last call; `gather` returns those of all ranks."""
        seen, self._seen = self._seen, []
        for part in (part for rows in seen for part in gather(rows) if len(part) > 1):
            F.batch_norm(part, self.mean, self.var, None, None, True, momentum=0.1, eps=STANDARDISE_EPS)
