"""The label that is probed: classes or values, some of them missing."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meristem.errors import ConfigError, DataError

TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Classes:
    """Classes of the training records, and those that only test records have.

    Attributes:
        names: of the classes; the first `num_known` are those that can be predicted.
        num_known: classes among the training records.
    """

    names: tuple[str, ...]
    num_known: int

    def codes(self, labels: Sequence[Any]) -> np.ndarray:
        """`[N]` the class of each label."""
        code = {name: number for number, name in enumerate(self.names)}
        return np.array([code[class_name(label)] for label in labels], np.int64)

    def unknown(self, codes: np.ndarray) -> dict[str, int]:
        """How many records have each class that training lacks."""
        return {
            self.names[code]: int(n) for code, n in sorted(Counter(codes[codes >= self.num_known].tolist()).items())
        }


def is_missing(label: Any) -> bool:
    """Whether a record has no label."""
    return label is None or (isinstance(label, str) and not label) or (isinstance(label, float) and math.isnan(label))


def class_name(label: Any) -> str:
    """Classes are words; a table may have made numbers of them, 1.0 where a value is missing."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def task_of(labels: Sequence[Any], asked: str, name: str) -> str:
    """Classification, or regression where labels are numbers and one of them has a fraction.

    Args:
        labels: none of them missing.
        asked: one of `TASKS`.
        name: of the label, for messages.

    Raises:
        ConfigError: words where values are asked for, or labels of tokens.
    """
    if any(isinstance(label, list | dict) for label in labels):
        raise ConfigError(f"label {name!r} must be one word or number a record; got lists, the labels of tokens")
    is_number = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    if asked == "regression" and not is_number:
        word = next(label for label in labels if not isinstance(label, int | float) or isinstance(label, bool))
        raise ConfigError(f"label {name!r} must be numbers for --task regression; got {word!r}")
    if asked == "auto":
        return "regression" if is_number and any(float(label) % 1 for label in labels) else "classification"
    return asked


def find_classes(train: Sequence[Any], test: Sequence[Any], name: str) -> Classes:
    """The classes of training records, then those that only the test has.

    Raises:
        DataError: training records of one class only.
    """
    known = _sorted({class_name(label) for label in train})
    if len(known) < 2:
        got = f"only {known[0]!r}" if known else "no label"
        raise DataError(f"label {name!r} must have two classes or more among the training records; got {got}")
    more = _sorted({class_name(label) for label in test} - set(known))
    return Classes((*known, *more), len(known))


def _sorted(names: set[str]) -> list[str]:
    """By number where all are numbers."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
