"""The label that is probed: its classes or values, where some records may have none."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from meristem.data.labels import Label, LabelColumn, named, number_of, placed, sort_classes
from meristem.data.store import RecordStore
from meristem.errors import ConfigError, DataError

Read = TypeVar("Read")

MISSING_OPTION = "--missing-label {}"
"""The option that declares a word to mean a missing label."""


def read_labels(store: RecordStore, name: str, missing: Sequence[str]) -> list[str | None]:
    """The label of each record of a store, None where it is missing.

    Args:
        missing: words that mean "no label", beside the empty one.

    Raises:
        DataError: a record has a label for each token.
    """
    column = LabelColumn(name, missing=tuple(missing), option=MISSING_OPTION)
    words = _each(store.column(name).to_pylist(), store.where, column.entries)
    return [first[0] if first else None for first in words]


def task_of(labels: Sequence[str], asked: str, name: str) -> str:
    """Classification, or regression where labels are numbers and one of them has a fraction.

    Args:
        labels: labels, none of them missing.
        asked: `ProbeOptions.task`, the answer unless it is auto.
        name: name of the label, for messages.

    Raises:
        ConfigError: the task is auto, and there are words among numbers with fractions.
    """
    if asked != "auto":
        return asked
    numbers = {word: number_of(word) for word in set(labels)}
    if not any(number is not None and number % 1 for number in numbers.values()):
        return "classification"
    words = Counter(label for label in labels if numbers[label] is None)
    if words:
        raise ConfigError(
            f"label {name!r} has numbers with fractions, and other words: {named(words)}; say "
            f"{MISSING_OPTION.format('WORD')} where a word stands for a missing label, or --task classification"
        )
    return "regression"


def find_numbers(labels: Sequence[str], name: str, where: Callable[[int], str]) -> np.ndarray:
    """`[N]` the numbers that the labels are.

    Args:
        where: gives the `file:line` of a label from its index.

    Raises:
        DataError: a label is not a number.
    """
    return np.array(_each(labels, where, LabelColumn(name, option=MISSING_OPTION).number))


def _each(labels: Sequence[Label], where: Callable[[int], str], read: Callable[[Any], Read]) -> list[Read]:
    """What `read` makes of each label; errors say where the label stands."""
    found = []
    for row, label in enumerate(labels):
        with placed(partial(where, row)):
            found.append(read(label))
    return found


def find_classes(train: Sequence[str], test: Sequence[str], name: str) -> tuple[tuple[str, ...], int]:
    """Names of the classes of training labels, and behind them those that only test labels have.

    Returns:
        The names, and how many are of training labels; only these can be predicted.

    Raises:
        DataError: the training records are of one class only.
    """
    known = sort_classes(set(train))
    if len(known) < 2:
        got = f"only {known[0]!r}" if known else "no label"
        raise DataError(f"label {name!r} must have two classes or more among the training records; got {got}")
    more = sort_classes(set(test) - set(known))
    return (*known, *more), len(known)
