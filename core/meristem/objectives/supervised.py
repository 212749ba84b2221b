"""Labels of records and of tokens: classes and values, several at once, some of them missing."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import MeanAbsoluteError, R2Score, SpearmanCorrCoef

from meristem.data.labels import MAX_NAMED, Label, LabelColumn, first_with, named, sort_classes, summarize
from meristem.data.parts import RunData
from meristem.errors import ConfigError, DataError
from meristem.model.config import Max, Mean, Pool, Prefix
from meristem.model.model import SYMBOLS
from meristem.model.outputs import Outputs, Wanted
from meristem.model.readout import Readout
from meristem.objectives.mixing import Mixing, mix
from meristem.objectives.objective import Objective
from meristem.shapes import Float, Int, Tensor
from meristem.types import IGNORE, LossOut, PackedBatch, Record, Term, Tokens

PARTNER, SHARE = "mixed.partner", "mixed.share"
"""Labels of a pack whose records are mixed: the sequence each is mixed with, and its share of itself. No column's name
has a dot."""

POOLS: dict[str, Pool | None] = {"mean": Mean(), "max": Max(), "cls": Prefix(), "own": None}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One label column and how it is predicted.

    Attributes:
        name: of the label column, and of the head.
        level: one label a record, or one a token (a string with one character a token, or a list).
        task: classes, or values. Values are standardised by the training records' mean and deviation.
        class_weights: `balanced` weighs each class by the inverse of its frequency among the training
            records; or one weight a class, in the order of the classes; null for equal weights.
        weight: of this target's loss beside the others.
        pool: how the rows of a record become one vector, or `own` for the model's (`architecture.pool`); unused at
            token level.
        is_standardised: the head sees each feature of the pooled vector less its mean, over its deviation; for
            records that differ little, such as the mutants of one protein. Record level only.
        hidden_width: width of a hidden layer in the head; 0 for a linear head.
        dropout: in the head, in training.
        label_smoothing: share of each target's probability that is spread evenly over all classes, in training.
    """

    name: str
    level: Literal["record", "token"] = "record"
    task: Literal["classification", "regression"] = "classification"
    class_weights: Literal["balanced"] | list[float] | None = None
    weight: float = 1.0
    pool: Literal["mean", "max", "cls", "own"] = "mean"
    is_standardised: bool = False
    hidden_width: int = 0
    dropout: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.class_weights is not None and self.task != "classification":
            raise ConfigError(f"target {self.name!r}: class_weights need task classification; got {self.task}")
        if self.name == SYMBOLS or not self.name or "." in self.name:
            raise ConfigError(f"target name must be a column's, without a dot and not {SYMBOLS!r}; got {self.name!r}")
        if self.weight <= 0:
            raise ConfigError(f"target {self.name!r}: weight must be positive; got {self.weight}")
        if self.is_standardised and self.level == "token":
            raise ConfigError(f"target {self.name!r}: is_standardised has an effect at record level only")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"target {self.name!r}: dropout must be in [0, 1); got {self.dropout}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"target {self.name!r}: label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.label_smoothing and self.task != "classification":
            raise ConfigError(f"target {self.name!r}: label_smoothing needs task classification; got {self.task}")


@dataclass(frozen=True)
class _Bound:
    """A target with what was learned from the training records.

    Attributes:
        column: how its labels are read.
        codes: number of each class.
        class_weights: of each class; empty for equal ones.
    """

    target: Target
    readout: Readout
    column: LabelColumn
    codes: Mapping[str, int] = field(default_factory=dict)
    class_weights: tuple[float, ...] = ()

    @property
    def is_classes(self) -> bool:
        return self.target.task == "classification"


class Supervised(Objective):
    """Predict labels: the text of a class is its name, values are numbers.

    A label that is missing counts for nothing: one that is null or empty, or a word of `data.missing_labels`. Classes
    are those of the training records, by number where all names are whole numbers, else by the alphabet.

    Args:
        targets: what is predicted; at least one.
        mixing: of pictures in pairs, in training; for classes of whole records, without weights.
    """

    def __init__(self, targets: list[Target], mixing: Mixing = Mixing()):  # noqa: B008 (frozen)
        names = [target.name for target in targets]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"objective.targets must name one column or more, each once; got {names}")
        self.targets = tuple(targets)
        self.label_columns = tuple(names)
        self.mixing = mixing
        self._bound: dict[str, _Bound] = {}
        self._num_special = (0, 0)
        self._grid: tuple[int, ...] = ()
        for target in targets if mixing.is_on else ():
            if target.level == "token" or target.task == "regression" or target.class_weights is not None:
                raise ConfigError(
                    f"objective.mixing needs targets that are classes of whole records, without class_weights; "
                    f"{target.name!r} is not"
                )

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer
        self._num_special, self._grid = tokenizer.num_special, tokenizer.grid
        if self.mixing.is_on and not self._grid:
            raise ConfigError(
                "objective.mixing needs pictures of one size; set data.tokenizer.image_px, or mixing.rate: 0"
            )
        self._bound = {target.name: self._learn(target, data) for target in self.targets}

    def _learn(self, target: Target, data: RunData) -> _Bound:
        """Learn a target from the training records, and check the labels of every part."""
        column = LabelColumn(target.name, target.level == "token", data.missing_labels)
        bound: _Bound | None = None
        counts = []
        for name in sorted(data.parts, key=lambda name: name != "train"):  # training first
            part = data.parts[name]
            labels = part.labels(target.name)
            found = summarize(column, labels, part.where, part.payload_lengths() if column.is_per_token else None)
            if target.task == "classification":
                bound = bound or _learn_classes(target, column, found.words, part.where)
                _require_known(bound, name, found.words, labels, part.where)
                shown = named(found.words)
            else:
                numbers = _numbers(column, labels, part.where)
                bound = bound or _learn_scale(target, column, numbers, part.where)
                shown = f"{numbers.min():g} to {numbers.max():g}" if len(numbers) else ""
            counts.append(f"{name} {found.says(shown)}")
        assert bound is not None, "a run has a part for training"
        self.remarks += (f"label {target.name}: {'; '.join(counts)}",)
        return bound

    @property
    def readouts(self) -> tuple[Readout, ...]:
        return tuple(bound.readout for bound in self._bound.values())

    def prepare(self, record: Record, tokens: tuple[Tokens, ...], rng: np.random.Generator) -> tuple[Tokens, ...]:
        by_record = {
            name: _encode(record.labels.get(name), bound, record)
            for name, bound in self._bound.items()
            if bound.target.level == "record"
        }
        prepared = []
        for one in tokens:
            by_token = {
                name: self._token_targets(record.labels.get(name), bound, one, record)
                for name, bound in self._bound.items()
                if bound.target.level == "token"
            }
            prepared.append(replace(one, labels={**one.labels, **by_record}, targets={**one.targets, **by_token}))
        return tuple(prepared)

    def _token_targets(self, value: Any, bound: _Bound, tokens: Tokens, record: Record) -> np.ndarray:
        """Targets of the rows of a sequence, which may be a window of its record (its spans say which)."""
        before, behind = self._num_special
        inner = slice(before, len(tokens) - behind)
        rows = np.full(len(tokens), IGNORE, np.int64 if bound.is_classes else np.float32)
        encoded = _encode(value, bound, record)
        if encoded.ndim:
            assert tokens.spans is not None, "targets of tokens need to know where each token lies"
            encoded = encoded[tokens.spans[inner, 0]]
            rows[inner] = encoded if bound.is_classes else np.where(np.isnan(encoded), IGNORE, encoded)
        return rows

    def counts(self, batch: PackedBatch) -> Mapping[str, float]:
        """As torch's cross-entropy counts: with class weights, the sum of the weights of the targets."""
        counts = {}
        for name, bound in self._bound.items():
            known = _known(self._of(batch, bound))[1]
            if bound.class_weights:
                weights_C = torch.tensor(bound.class_weights, dtype=torch.float64)
                counts[name] = float(weights_C[known.long().cpu()].sum())
            else:
                counts[name] = float(len(known))
        return counts | self.router_counts(batch)

    @staticmethod
    def _of(batch: PackedBatch, bound: _Bound) -> Tensor:
        """`[S]` or `[T]` targets in a pack."""
        return (batch.labels if bound.target.level == "record" else batch.targets)[bound.target.name]

    def seen(self, batch: PackedBatch, is_training: bool) -> PackedBatch:
        """In training with its records mixed in pairs, but for those that lack a label."""
        if not (is_training and self.mixing.is_on):
            return batch
        may_S = torch.stack([batch.labels[name] != IGNORE for name in self._bound]).all(0)
        mixed = mix(batch, self.mixing, self._grid, may_S)
        return replace(mixed.batch, labels={**batch.labels, PARTNER: mixed.partners, SHARE: mixed.shares})

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted(tuple(self._bound), num_special=self._num_special, num_first=0)

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        terms, predictions, targets = {}, {}, {}
        for name, bound in self._bound.items():
            labels_R = self._of(batch, bound)
            rows_M, wanted_M = _known(labels_R)
            out_MC = outputs.heads[name].index_select(0, rows_M).float()
            if bound.is_classes:
                nats_M = _class_nats(out_MC, wanted_M, bound, outputs.is_training)
                if PARTNER in batch.labels:
                    others_M, shares_M = labels_R[batch.labels[PARTNER][rows_M]], batch.labels[SHARE][rows_M]
                    nats_M = torch.lerp(_class_nats(out_MC, others_M, bound, outputs.is_training), nats_M, shares_M)
                terms[name] = _class_term(nats_M, wanted_M, bound)
                predictions[name], targets[name] = out_MC.detach(), wanted_M
            else:
                total = F.mse_loss(out_MC[:, 0], wanted_M, reduction="sum")
                terms[name] = Term(total, torch.tensor(float(len(rows_M)), device=total.device), bound.target.weight)
                mean, std = bound.readout.mean[0], bound.readout.std[0]
                predictions[name], targets[name] = out_MC.detach()[:, 0] * std + mean, wanted_M * std + mean
        if outputs.is_training:
            terms |= self.more_terms(batch, outputs)
        return LossOut(terms, predictions, targets)

    def more_terms(self, batch: PackedBatch, outputs: Outputs) -> dict[str, Term]:
        """What else training asks of the heads' outputs: nothing here.

        Args:
            batch: as the model read it.
            outputs: of the model, those of each target among them.
        """
        return {}

    def metrics(self) -> dict[str, Metric]:
        found = super().metrics()
        for name, bound in self._bound.items():
            if bound.is_classes:
                num = len(bound.readout.classes)
                found[f"{name}/accuracy"] = MulticlassAccuracy(num, average="micro")
                if num > 5:
                    found[f"{name}/top5"] = MulticlassAccuracy(num, top_k=5, average="micro")
                found[f"{name}/mcc"] = MulticlassMatthewsCorrCoef(num)
                found[f"{name}/macro_f1"] = MulticlassF1Score(num, average="macro")
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # it keeps every value: a rank needs them all
                    found[f"{name}/spearman"] = SpearmanCorrCoef()
                found[f"{name}/mae"] = MeanAbsoluteError()
                found[f"{name}/r2"] = R2Score()
        return found

    def confusions(self) -> dict[str, Metric]:
        return {
            name: MulticlassConfusionMatrix(len(bound.readout.classes))
            for name, bound in self._bound.items()
            if bound.is_classes
        }


def _known(values: Tensor) -> tuple[Int[Tensor, "M"], Tensor]:
    """Rows that have a target, and their targets."""
    is_known = values != IGNORE
    if values.is_floating_point():
        is_known &= ~values.isnan()
    rows = is_known.nonzero().squeeze(1)
    return rows, values.index_select(0, rows)


def _class_nats(
    logits: Float[Tensor, "M C"], wanted: Int[Tensor, "M"], bound: _Bound, is_training: bool
) -> Float[Tensor, "M"]:
    """Cross-entropies; smoothed in training alone, so that evaluations compare."""
    weights_C = torch.tensor(bound.class_weights, device=logits.device) if bound.class_weights else None
    smoothing = bound.target.label_smoothing if is_training else 0.0
    return F.cross_entropy(logits, wanted, weights_C, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)


def _class_term(nats: Float[Tensor, "M"], wanted: Int[Tensor, "M"], bound: _Bound) -> Term:
    if not bound.class_weights:
        return Term(nats.sum(), torch.tensor(float(len(wanted)), device=nats.device), bound.target.weight)
    weights_C = torch.tensor(bound.class_weights, device=nats.device)
    return Term(nats.sum(), weights_C.index_select(0, wanted).sum(), bound.target.weight)


def _learn_classes(target: Target, column: LabelColumn, counts: Counter[str], where: Callable[[int], str]) -> _Bound:
    classes = sort_classes(counts)
    if len(classes) < 2:
        raise DataError(
            f"{where(0)}: label column {target.name!r} must have two classes or more among the training records; "
            f"got {named(counts) or 'no label'}"
        )
    weights: tuple[float, ...] = ()
    if target.class_weights == "balanced":
        total = sum(counts.values())
        weights = tuple(total / (len(classes) * counts[name]) for name in classes)
    elif target.class_weights is not None:
        weights = tuple(float(weight) for weight in target.class_weights)
        if len(weights) != len(classes) or min(weights) < 0:
            raise ConfigError(
                f"target {target.name!r}: class_weights must be one weight of 0 or more a class; "
                f"got {len(weights)} for {len(classes)} classes: {', '.join(classes)}"
            )
    codes = {name: code for code, name in enumerate(classes)}
    return _Bound(target, _readout(target, classes=classes), column, codes, weights)


def _require_known(
    bound: _Bound, part: str, counts: Counter[str], labels: Sequence[Label], where: Callable[[int], str]
) -> None:
    """Refuse classes that no training record has."""
    unknown = Counter({word: count for word, count in counts.items() if word not in bound.codes})
    if unknown:
        column = bound.column
        first = where(first_with(column, labels, unknown))
        declared = column.option.format(sort_classes(unknown)[0])
        raise DataError(
            f"{first}: label {column.name!r} must be a class of the training records ({_listed(bound)}); the {part} "
            f"part has others: {named(unknown)} (if a word stands for a missing label: {declared})"
        )


def _listed(bound: _Bound) -> str:
    classes = bound.readout.classes
    return ", ".join(classes[:MAX_NAMED]) + (f", and {len(classes) - MAX_NAMED} more" * (len(classes) > MAX_NAMED))


def _numbers(column: LabelColumn, labels: Sequence[Label], where: Callable[[int], str]) -> np.ndarray:
    """The numbers of all labels that are not missing."""
    numbers = [
        column.number(word, partial(where, row))
        for row, label in enumerate(labels)
        for word in column.entries(label, partial(where, row))
        if word is not None
    ]
    return np.array(numbers, np.float64)


def _learn_scale(target: Target, column: LabelColumn, numbers: np.ndarray, where: Callable[[int], str]) -> _Bound:
    if len(numbers) < 2 or numbers.std() == 0:
        raise DataError(
            f"{where(0)}: label column {target.name!r} must have two different finite values or more among the "
            f"training records; got {len(numbers)} value(s), {len(np.unique(numbers))} different"
        )
    readout = _readout(target, mean=(float(numbers.mean()),), std=(float(numbers.std()),))
    return _Bound(target, readout, column)


def _readout(target: Target, **learned: Any) -> Readout:
    learned.setdefault("classes", ())
    return Readout(
        name=target.name,
        level=target.level,
        task=target.task,
        pool=POOLS[target.pool],
        is_standardised=target.is_standardised,
        hidden_width=target.hidden_width,
        dropout=target.dropout,
        **learned,
    )


def _encode(value: Label, bound: _Bound, record: Record) -> np.ndarray:
    """The labels of a record as the loss takes them: codes of classes (`IGNORE` where missing), or scaled values (nan).

    A number where the record has one label, or none; `[n]` where its tokens have labels.
    """
    column = bound.column
    where = lambda: record.source  # noqa: E731
    words = column.entries(value, where, len(record.payload))
    if not words:
        return np.array(IGNORE) if bound.is_classes else np.array(np.nan, np.float32)
    encoded: np.ndarray
    if bound.is_classes:
        unknown = next((word for word in words if word is not None and word not in bound.codes), None)
        if unknown is not None:
            raise DataError(
                f"{record.source}: label {column.name!r} must be a class of the training records ({_listed(bound)}); "
                f"got {unknown!r}"
            )
        encoded = np.array([IGNORE if word is None else bound.codes[word] for word in words], np.int64)
    else:
        numbers = np.array([np.nan if word is None else column.number(word, where) for word in words])
        encoded = ((numbers - bound.readout.mean[0]) / bound.readout.std[0]).astype(np.float32)
    return encoded if column.is_per_token else encoded[0]
