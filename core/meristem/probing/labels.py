"""The label that is probed: classes or values, some of them missing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from meristem.data.labels import Label, LabelColumn, named, number_of, placed, sort_classes
from meristem.data.store import RecordStore
from meristem.errors import ConfigError, DataError

TASKS = ("auto", "classification", "regression")

MISSING_OPTION = "--missing-label {}"
"""What a user writes to declare a word missing."""


@dataclass(frozen=True)
class Classes:
    """Classes of the training records, and those that only test records have.

    Attributes:
        names: of the classes; the first `num_known` are those that can be predicted.
        num_known: classes among the training records.
    """

    names: tuple[str, ...]
    num_known: int

    def codes(self, labels: Sequence[str]) -> np.ndarray:
        """`[N]` the class of each label."""
        code = {name: number for number, name in enumerate(self.names)}
        return np.array([code[label] for label in labels], np.int64)

    def unknown(self, codes: np.ndarray) -> dict[str, int]:
        """How many records have each class that training lacks."""
        return {
            self.names[code]: int(n) for code, n in sorted(Counter(codes[codes >= self.num_known].tolist()).items())
        }


def read_labels(store: RecordStore, name: str, missing: Sequence[str]) -> list[str | None]:
    """One word for each record of a store, None where its label is missing.

    Args:
        missing: words that mean "no label", beside the empty one.

    Raises:
        DataError: labels of tokens.
    """
    column = LabelColumn(name, missing=tuple(missing), option=MISSING_OPTION)
    labels: list[Label] = store.column(name).to_pylist()
    found = []
    for row, label in enumerate(labels):
        with placed(partial(store.where, row)):
            words = column.entries(label)
        found.append(words[0] if words else None)
    return found


def task_of(labels: Sequence[str], asked: str, name: str) -> str:
    """Classification, or regression where labels are numbers and one of them has a fraction.

    Args:
        labels: none of them missing.
        asked: one of `TASKS`.
        name: of the label, for messages.

    Raises:
        ConfigError: nothing is asked for, and words stand among numbers with fractions.
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
    """`[N]` the numbers that labels spell.

    Args:
        where: `file:line` of a label by its place.

    Raises:
        DataError: a label that spells none.
    """
    column = LabelColumn(name, option=MISSING_OPTION)
    found = []
    for row, label in enumerate(labels):
        with placed(partial(where, row)):
            found.append(column.number(label))
    return np.array(found)


def find_classes(train: Sequence[str], test: Sequence[str], name: str) -> Classes:
    """The classes of training records, then those that only the test has.

    Raises:
        DataError: training records of one class only.
    """
    known = sort_classes(set(train))
    if len(known) < 2:
        got = f"only {known[0]!r}" if known else "no label"
        raise DataError(f"label {name!r} must have two classes or more among the training records; got {got}")
    more = sort_classes(set(test) - set(known))
    return Classes((*known, *more), len(known))
