"""The labels of the records of a probe, and which of these are for training, for validation and for the test."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from meristem.data.labels import Label, LabelColumn, named, number_of, placed, sort_classes
from meristem.data.split import split_by_column, split_by_hash, split_by_similarity
from meristem.data.store import RecordStore
from meristem.domain import Domain
from meristem.errors import ConfigError, DataError
from meristem.probing.options import ProbeOptions

DEFAULT_TEST_FRAC = 0.2

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


def deal(
    store: RecordStore, domain: Domain, has_label: np.ndarray, options: ProbeOptions, has_test_files: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deal the records that have a label.

    Args:
        has_label: `[N]` which records have one.
        options: how to split. A split column that names no validation part leaves it to be taken from training.
        has_test_files: no record of the store is for the test.

    Returns:
        Rows of the store, each in ascending order: those that probes are fitted to; those that the penalty is chosen
        by, which the last fit takes as well; and those that probes are evaluated on.

    Raises:
        ConfigError: a method that does not suit the records.
        DataError: a part without a labelled record.
    """
    test_frac = 0.0 if has_test_files else options.test_frac or DEFAULT_TEST_FRAC
    validation_frac, seed = options.validation_frac, options.seed
    if options.split_column:
        parts = split_by_column(store)
        if test_frac and "test" not in parts:
            raise DataError("the split column names no record for the test; give files with --test")
        if not test_frac and "test" in parts:
            raise ConfigError("the split column names records for the test and --test gives files; keep one of the two")
    elif options.split == "similarity":
        fractions = {"train": 1 - test_frac - validation_frac, "validation": validation_frac, "test": test_frac}
        parts = split_by_similarity(store, fractions, seed, domain.similarity_with())
    else:
        parts = split_by_hash(store, {"train": 1 - test_frac, "test": test_frac}, seed)
    labelled = {name: rows[has_label[rows]] for name, rows in parts.items()}
    train, validation, test = (labelled.get(name, np.zeros(0, np.int64)) for name in ("train", "validation", "test"))
    if not len(validation):
        train, validation = _held_out(store, train, validation_frac, seed)
    if not len(train):
        raise DataError("no record with a label is left for training; see the split, or give more records")
    if test_frac and not len(test):
        raise DataError("no record with a label is left for the test; see the split, or give files with --test")
    return train, validation, test


def _held_out(store: RecordStore, rows: np.ndarray, frac: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share of rows: the other rows, then those with the lowest hashes. Equal payloads stay together."""
    count = int(np.ceil(frac * len(rows)))
    if not count or count >= len(rows):
        return rows, np.zeros(0, np.int64)
    hashes = store.group_hashes(seed + 1)[rows]  # another seed than that of the test
    is_out = hashes <= np.partition(hashes, count - 1)[count - 1]
    return rows[~is_out], rows[is_out]
