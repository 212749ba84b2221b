"""What objectives that predict symbols share: the loss over scored rows, and its figures."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torchmetrics import Metric

from meristem.errors import require
from meristem.model.config.checks import require_frac
from meristem.model.heads import HeadSpec, Symbols
from meristem.model.heads.symbols import SymbolLoss
from meristem.model.model import SYMBOLS
from meristem.model.outputs import HeadRequest, Outputs, Wanted
from meristem.objectives.objective import Objective
from meristem.shapes import Tensor
from meristem.types import IGNORE, LossOut, PackedBatch


def request_symbols(batch: PackedBatch, label_smoothing: float = 0.0) -> HeadRequest:
    """Ask the head of symbols for its loss at the rows that `targets["tokens"]` scores.

    Args:
        label_smoothing: share of the target's probability that is spread evenly over all symbols, the target among
            them (Szegedy 2016, arXiv 1512.00567, section 7; as `torch.nn.functional.cross_entropy` has it).
    """
    targets_T = batch.targets[SYMBOLS]
    rows_M = (targets_T != IGNORE).nonzero().squeeze(1)
    return HeadRequest(rows_M, targets_T.index_select(0, rows_M), label_smoothing)


class SymbolObjective(Objective):
    """An objective whose loss is the cross-entropy of symbols; how they are chosen is left to `prepare`.

    Args:
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    predicts_symbols = True

    def __init__(self, label_smoothing: float = 0.0):
        require_frac(label_smoothing, "objective.label_smoothing")
        self.label_smoothing = label_smoothing

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        return {SYMBOLS: Symbols()}

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted({SYMBOLS: request_symbols(batch, self.label_smoothing)})

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        scored: SymbolLoss = outputs.heads[SYMBOLS]
        return LossOut({SYMBOLS: scored.term}, {SYMBOLS: scored.figures}, {SYMBOLS: scored.targets})

    def metrics(self) -> dict[str, Metric]:
        return {
            **super().metrics(),
            f"{SYMBOLS}/accuracy": MeanFigure(HITS),
            f"{SYMBOLS}/perplexity": MeanFigure(NATS, torch.exp),
            f"{SYMBOLS}/bits": MeanFigure(NATS, bits),
        }


def require_fractions(fractions: Mapping[str, float], above_zero: Sequence[str] = ()) -> None:
    """Refuse options of an objective, by name, that are no fractions; those named in `above_zero` must not be 0."""
    for name, value in fractions.items():
        low = "above 0" if name in above_zero else "0 or more"
        is_right = 0 <= value <= 1 and (value > 0 or name not in above_zero)
        require(is_right, f"objective.{name} must be {low} and at most 1", value)


HITS, NATS = 0, 1
"""Columns of `SymbolLoss.figures`."""


class MeanFigure(Metric):
    """The mean of a column of `SymbolLoss.figures`, over all scored rows at once: no logits are kept.

    Args:
        column: `HITS` or `NATS`.
        then: what becomes of the mean.
    """

    total: Tensor
    count: Tensor

    def __init__(self, column: int, then: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
        super().__init__()
        self.column, self.then = column, then
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: Tensor, targets: Tensor) -> None:
        self.total += figures[:, self.column].double().sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        return self.then(self.total / self.count)


def bits(nats: Tensor) -> Tensor:
    """Nats in bits."""
    return nats / math.log(2)
