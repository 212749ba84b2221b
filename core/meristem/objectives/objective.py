"""The contract of an objective: what is asked of a sequence, what it needs beside the trunk, and the loss."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from torch import nn

from meristem.data.parts import Encoder, RunData
from meristem.model.config import TokenHead, TransformerConfig
from meristem.model.heads import HeadSpec
from meristem.model.model import Model
from meristem.model.outputs import Outputs, Wanted
from meristem.objectives.routing import routing_counts, routing_figures, routing_terms
from meristem.shapes import Tensor
from meristem.types import IGNORE, INPUT, LossOut, PackedBatch, Record, Tokens

if TYPE_CHECKING:  # it imports scipy and torchvision, for seconds, and verbs that only read models need none of it
    from torchmetrics import Metric


class Processes(Protocol):
    """The processes that train together. Every one of them must make the same calls, in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; its shape must be the same in each."""

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The tensor `[n, ...]` of every process, by rank; n may differ."""


class Objective(ABC):
    """What a model is trained for.

    The order of calls: `bind` and `bind_model` once when data, tokenizer and architecture are known, `prepare` in
    the data path for each record, `counts` for each pack, `build` and `start` once with the model, then at each step
    `loss_of`, which calls `seen`, `wanted`, the model and `loss`, and `after_step`.
    An objective is a plain value that travels to loader workers; tensors and modules live in what `build` gives.
    """

    inputs: tuple[str, ...] = (INPUT,)
    """Inputs of the records that this objective reads. Windows are cut from the first, and labels of tokens are its."""

    payload_inputs: tuple[str, ...] = ()
    """Those of `inputs` that `prepare` reads as payloads, from the record; no tokens are made of them ahead."""

    joined_inputs: ClassVar[tuple[str, ...]] = ()
    """Those of `inputs` that verbs such as predict read, of which `join` makes one sequence. Empty for the first input
    as it is."""

    label_columns: tuple[str, ...] = ()
    """Label columns of the records that this objective reads."""

    remarks: tuple[str, ...] = ()
    """What `bind` found that a user should know, one line each."""

    predicts_symbols: ClassVar[bool] = False
    """Its models have the head of symbols, which `architecture.head` describes."""

    reads_pool: ClassVar[bool] = False
    """Its loss reads the vectors of the model's own pool."""

    config: TransformerConfig | None = None
    """The architecture, known after `bind_model`."""

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        objective = super().__new__(cls)
        objective._given = args, kwargs
        return objective

    @property
    def arguments(self) -> dict[str, Any]:
        """What the objective was made with, by name, defaults included."""
        args, kwargs = self._given
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        found: dict[str, Any] = {}
        for name, parameter in [*bound.signature.parameters.items()][1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                found |= bound.arguments[name]
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                found[name] = bound.arguments[name]
        return found

    def bind(self, data: RunData) -> None:
        """Learn from the training records what the objective must know, and check what it reads of every part.

        Raises:
            ConfigError: the objective cannot be trained on these records.
            DataError: a label is not what the objective needs.
        """

    @classmethod
    def complete(cls, config: TransformerConfig) -> TransformerConfig:
        """The architecture with what this objective needs and nothing is said of."""
        return replace(config, head=TokenHead()) if cls.predicts_symbols and config.head is None else config

    def bind_model(self, config: TransformerConfig) -> None:
        """Learn what is trained, before anything is written.

        Raises:
            ConfigError: such a model cannot be trained for this objective.
        """
        self.config = config

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        """`[N]` rows that records of so many tokens, of all inputs, have in a pack; packs are planned by it.

        Known after `bind`. An estimate will do: a pack that is fuller than planned takes more memory, no more.
        """
        return lengths

    @abstractmethod
    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        """The sequences of one record, corrupted, paired and labelled: a pure function of its arguments.

        Args:
            encode: gives the tokens of an input by its name, and those of other payloads.
            rng: keyed by (seed, epoch, record); nothing else may be drawn from.
        """

    @classmethod
    def join(cls, inputs: Mapping[str, Tokens], config: TransformerConfig) -> Tokens:
        """The one sequence that a trained model reads of the inputs of a record, nothing of it hidden.

        Called where `joined_inputs` names inputs, with the tokens of each as its tokenizer gives it; then it must agree
        with what `prepare` makes of them. The model's config may bound the length.
        """
        raise NotImplementedError

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        """How much each term of `loss` counts in this pack, known before the trunk runs.

        The default: scored tokens and known labels by name.
        """
        counts = {name: float((value != IGNORE).sum()) for name, value in batch.targets.items()}
        for name, value in batch.labels.items():
            is_known = ~value.isnan() if value.is_floating_point() else value != IGNORE
            counts[name] = float(is_known.sum())
        return counts | self.router_counts(batch)

    def router_counts(self, batch: PackedBatch) -> dict[str, float]:
        """How much each term of expert layers counts in this pack; part of all `counts`."""
        return {} if self.config is None else routing_counts(batch, self.config)

    @property
    def heads(self) -> Mapping[str, HeadSpec]:
        """Heads of the model that this objective trains, by name; those of labels are known after `bind`."""
        return {}

    def build(self, config: TransformerConfig) -> nn.ModuleDict:
        """Modules that training alone needs (a light decoder, a teacher); they stay out of the model directory."""
        return nn.ModuleDict()

    def start(self, model: Model, extra: nn.ModuleDict, total_steps: int) -> None:
        """Called once when the model has its first weights: a teacher begins as its student is.

        A run that goes on loads its state after this. What rises or falls over a run ends at `total_steps`.
        """

    def loss_of(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        """Run a model over a pack and give its loss, with the terms of its expert layers; `extra` is as in `loss`."""
        seen = self.seen(batch, model.training)
        outputs = model(seen, self.wanted(seen))
        out = self.loss(outputs, extra, seen)
        if self.config is None:
            assert not outputs.hidden.routing, "a model with expert layers is trained after bind_model"
            return out
        predictions, targets = routing_figures(outputs.hidden, self.config)
        return LossOut(
            terms={**out.terms, **routing_terms(outputs.hidden, self.config)},
            predictions={**out.predictions, **predictions},
            targets={**out.targets, **targets},
        )

    def seen(self, batch: PackedBatch, is_training: bool) -> PackedBatch:
        """The pack as the model reads it, such as with its records mixed."""
        return batch

    @abstractmethod
    def wanted(self, batch: PackedBatch) -> Wanted:
        """What the model is asked for of a pack, which is as `seen` gave it."""

    @abstractmethod
    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        """Loss terms as sums and counts; each count equals that of `counts`. Those of expert layers are added later.

        `outputs` is what the model gave for `wanted`, `extra` what `build` gave, and the pack is as `seen` gave it.
        """

    def metrics(self) -> "dict[str, Metric]":
        """torchmetrics by name, updated with `predictions[name]`, `targets[name]` of the `LossOut`.

        A name is `<prediction>/<metric>`, such as `location/mcc`. Those of expert layers are in all of them.
        """
        if self.config is None:
            return {}
        from meristem.objectives.router_metrics import router_metrics

        return router_metrics(self.config)

    def confusions(self) -> "dict[str, Metric]":
        """torchmetrics of how often each class was taken for each: `[C, C]` by name of a prediction.

        A name is that of a readout, whose classes they are.
        """
        return {}

    def figures(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> Mapping[str, np.ndarray]:
        """Figures of a pack by name, `[H, W, 3]` bytes of red, green and blue; written at each validation."""
        return {}

    def after_step(self, model: Model, extra: nn.ModuleDict, processes: Processes) -> None:
        """Called after each optimiser step, in every process: a teacher's moving average lives here."""
