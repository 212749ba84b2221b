"""Targets of a supervised objective: which labels are predicted, and what is learned of them before training."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from meristem.data.labels import Label, LabelColumn, listed, named, placed, sort_classes
from meristem.data.parts import Part, RunData
from meristem.errors import ConfigError, DataError, require
from meristem.model.config import Max, Mean, Pool, Prefix
from meristem.model.config.checks import require_all
from meristem.model.heads import Readout
from meristem.model.model import SYMBOLS
from meristem.types import IGNORE, Record

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
            records that differ little, such as the variants of one text. Record level only.
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
        own, is_classes = f"target {self.name!r}:", self.task == "classification"
        require(self.class_weights is None or is_classes, f"{own} class_weights need task classification", self.task)
        is_column = self.name != SYMBOLS and self.name != "" and "." not in self.name
        require(is_column, f"target name must be a column's, without a dot and not {SYMBOLS!r}", repr(self.name))
        require_all(self, f"{own} ", "positive", "weight")
        if self.is_standardised and self.level == "token":
            raise ConfigError(f"{own} is_standardised has an effect at record level only")
        require_all(self, f"{own} ", "in [0, 1)", "dropout", "label_smoothing")
        require(not self.label_smoothing or is_classes, f"{own} label_smoothing needs task classification", self.task)


@dataclass(frozen=True)
class BoundTarget:
    """A target with what was learned from the training records.

    Attributes:
        column: how its labels are read.
        class_weights: of each class; empty for equal ones.
        remark: counts of its labels in every part.
    """

    target: Target
    readout: Readout
    column: LabelColumn
    class_weights: tuple[float, ...] = ()
    remark: str = ""

    @cached_property
    def codes(self) -> dict[str, int]:
        """Number of each class."""
        return {name: code for code, name in enumerate(self.readout.classes)}

    @property
    def rule(self) -> str:
        """What a label of a class must be, for messages."""
        return f"label {self.column.name!r} must be a class of the training records ({listed(self.readout.classes)})"

    @property
    def is_classes(self) -> bool:
        return self.target.task == "classification"


def learn(target: Target, data: RunData) -> BoundTarget:
    """Learn a target from the training records, and check the labels of every part.

    A record whose label cannot be what the target says is refused (`RunData.refuse`) and not learned from.

    Raises:
        ConfigError: class weights that do not fit the classes.
        DataError: labels that cannot be what the target says, by file and line; a part without any.
    """
    column = LabelColumn(target.name, target.level == "token", data.missing_labels)
    bound: BoundTarget | None = None
    remarks = []
    for name in sorted(data.parts, key=lambda name: name != "train"):  # training first
        part = data.parts[name]
        labels = _Labels(part, column, partial(data.refuse, name))
        counts: Counter[str | None] = Counter()
        num_labelled = 0
        for _, words in labels:
            counts.update(words)
            num_labelled += any(words)
        num_missing = counts.pop(None, 0)
        if target.task == "classification":
            bound = bound or _learn_classes(target, column, counts, part)  # type: ignore[arg-type]
            _refuse_unknown(bound, name, counts, labels)  # type: ignore[arg-type]
            shown = named(counts)  # type: ignore[arg-type]
        else:
            numbers = _numbers(column, labels)
            bound = bound or _learn_scale(target, column, numbers, part)
            shown = f"{numbers.min():g} to {numbers.max():g}" if len(numbers) else ""
        if not num_labelled:  # the mean of a loss over nothing is no number
            raise DataError(
                f"{part.where(0)}: the {name} part must have a record with a label {target.name!r}; "
                f"none of its {len(part):,} records has one (see data.split and data.missing_labels)"
            )
        tokens = f", {num_missing:,} tokens of them without" if num_missing else ""
        without = f"{len(part) - num_labelled:,} without ({shown or 'none'})"
        remarks.append(f"{name} {num_labelled:,} with a label{tokens}, {without}")
    assert bound is not None, "a run has a part for training"
    return replace(bound, remark=f"label {target.name}: {'; '.join(remarks)}")


class _Labels:
    """The labels of a part, read again each time: the place and the words of each record that is not refused."""

    def __init__(self, part: Part, column: LabelColumn, refuse: Callable[[int, str], None]):
        self.column, self.refuse = column, refuse
        self._labels = part.labels(column.name)
        self._lengths = part.payload_lengths().tolist() if column.is_per_token else [None] * len(part)

    def __iter__(self) -> Iterator[tuple[int, list[str | None]]]:
        for row, (label, length) in enumerate(zip(self._labels, self._lengths)):
            try:
                yield row, self.column.entries(label, length)
            except DataError as error:
                self.refuse(row, str(error))


def _learn_classes(target: Target, column: LabelColumn, counts: Counter[str], part: Part) -> BoundTarget:
    classes = sort_classes(counts)
    if len(classes) < 2:
        raise DataError(
            f"{part.where(0)}: label column {target.name!r} must have two classes or more among the training records; "
            f"got {named(counts) or 'no label'}"
        )
    weights: tuple[float, ...] = ()
    if target.class_weights == "balanced":
        total = sum(counts.values())
        weights = tuple(total / (len(classes) * counts[name]) for name in classes)
    elif target.class_weights is not None:
        weights = tuple(float(weight) for weight in target.class_weights)
        rule = f"target {target.name!r}: class_weights must be one weight of 0 or more a class"
        got = f"{len(weights)} for {len(classes)} classes: {', '.join(classes)}"
        require(len(weights) == len(classes) and min(weights) >= 0, rule, got)
    return BoundTarget(target, _readout(target, classes=classes), column, weights)


def _refuse_unknown(bound: BoundTarget, part: str, counts: Counter[str], labels: _Labels) -> None:
    """Refuse records of classes that no training record has."""
    unknown = Counter({word: count for word, count in counts.items() if word not in bound.codes})
    for row, words in labels if unknown else ():
        if not unknown.keys().isdisjoint(words):
            declared = bound.column.option.format(sort_classes(unknown)[0])
            others = f"{named(unknown)} (if a word stands for a missing label: {declared})"
            labels.refuse(row, f"{bound.rule}; the {part} part has others: {others}")


def _numbers(column: LabelColumn, labels: _Labels) -> np.ndarray:
    """The numbers of all labels that are not missing."""
    found: list[float] = []
    for row, words in labels:
        try:
            found += [column.number(word) for word in words if word is not None]
        except DataError as error:
            labels.refuse(row, str(error))
    return np.array(found, np.float64)


def _learn_scale(target: Target, column: LabelColumn, numbers: np.ndarray, part: Part) -> BoundTarget:
    if len(numbers) < 2 or numbers.std() == 0:
        raise DataError(
            f"{part.where(0)}: label column {target.name!r} must have two different finite values or more among the "
            f"training records; got {len(numbers)} value(s), {len(np.unique(numbers))} different"
        )
    readout = _readout(target, mean=(float(numbers.mean()),), std=(float(numbers.std()),))
    return BoundTarget(target, readout, column)


def _readout(target: Target, **learned: Any) -> Readout:
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


def encode_labels(value: Label, bound: BoundTarget, record: Record) -> np.ndarray:
    """The labels of a record as the loss takes them: codes of classes (`IGNORE` where missing), or scaled values (nan).

    A number where the record has one label, or none; `[n]` where its tokens have labels.

    Raises:
        DataError: a label that cannot be what the target says, by file and line.
    """
    column = bound.column
    with placed(lambda: record.source):
        words = column.entries(value, len(record.payload) if column.is_per_token else 0)
        if not words:
            return np.array(IGNORE) if bound.is_classes else np.array(np.nan, np.float32)
        encoded: np.ndarray
        if bound.is_classes:
            unknown = next((word for word in words if word is not None and word not in bound.codes), None)
            if unknown is not None:
                raise DataError(f"{bound.rule}; got {unknown!r}")
            encoded = np.array([IGNORE if word is None else bound.codes[word] for word in words], np.int64)
        else:
            numbers = np.array([np.nan if word is None else column.number(word) for word in words])
            encoded = ((numbers - bound.readout.mean[0]) / bound.readout.std[0]).astype(np.float32)
    return encoded if column.is_per_token else encoded[0]
