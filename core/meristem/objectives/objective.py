"""The contract of an objective: what is asked of a sequence, what it needs beside the trunk, and the loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from meristem.data.tokenizer import Tokenizer
from meristem.model.config import TransformerConfig
from meristem.model.model import Model
from meristem.model.readout import Readout
from meristem.types import IGNORE, LossOut, PackedBatch, Record, Tokens

if TYPE_CHECKING:  # it imports scipy and torchvision, for seconds, and verbs that only read models need none of it
    from torchmetrics import Metric


class Objective(ABC):
    """What a model is trained for.

    The order of calls: `bind` once when data and tokenizer are known, `prepare` in the data path for each
    record, `counts` for each pack, `build` once with the model, then `loss` and `after_step` at each step.
    An objective is a plain value that travels to loader workers; tensors and modules live in what `build` gives.
    """

    label_columns: tuple[str, ...] = ()
    """Label columns of the records that this objective reads."""

    def bind(self, tokenizer: Tokenizer, labels: Mapping[str, Sequence[Any]], where: Callable[[int], str]) -> None:
        """Learn from the training records what the objective must know.

        Args:
            tokenizer: gives mask and random symbols.
            labels: the label columns of the training records by name, None where missing.
            where: `file:line` of a training record by its row in the columns, for messages.

        Raises:
            ConfigError: the objective cannot be trained on these records.
            DataError: a label is not what the objective needs.
        """

    @abstractmethod
    def prepare(self, record: Record, tokens: tuple[Tokens, ...], rng: np.random.Generator) -> tuple[Tokens, ...]:
        """Views, pairs, corruption, labels of one record: a pure function of its arguments.

        Args:
            rng: keyed by (seed, epoch, record); nothing else may be drawn from.
        """

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        """How much each term of `loss` counts in this pack, known before the trunk runs.

        The default: scored tokens and known labels by name.
        """
        counts = {name: float((value != IGNORE).sum()) for name, value in batch.targets.items()}
        for name, value in batch.labels.items():
            is_known = ~value.isnan() if value.is_floating_point() else value != IGNORE
            counts[name] = float(is_known.sum())
        return counts

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads of the model that this objective trains and that are no label's, such as `tokens`."""
        return ()

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """Labels that the model is to predict, known after `bind`; each becomes a head of its name."""
        return ()

    def build(self, config: TransformerConfig) -> nn.ModuleDict:
        """Modules that training alone needs (a light decoder, a teacher); they stay out of the model directory."""
        return nn.ModuleDict()

    @abstractmethod
    def loss(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        """Loss terms as sums and counts; each count equals that of `counts`.

        Args:
            model: trunk and heads.
            extra: what `build` gave.
        """

    def metrics(self) -> "dict[str, Metric]":
        """torchmetrics by name, updated with `predictions[name]`, `targets[name]` of the `LossOut`.

        A name is `<prediction>/<metric>`, such as `location/mcc`.
        """
        return {}

    def after_step(self, model: Model, extra: nn.ModuleDict) -> None:
        """Called after each optimiser step: a teacher's moving average lives here."""
