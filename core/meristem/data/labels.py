"""Labels: kept as text in record stores, and given a type here, by the objective or the probe that uses them.

A label is a word, or a list of words where each token has one. The text of a class is its name: `01` and `1`, or
`1.10` and `1.1`, are two classes. Only an empty label is missing, beside the words that the user declares missing.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.errors import DataError

Label = str | Sequence[str | None] | None
"""A label as records have it: a word, a list of words, or None."""

MAX_NAMED = 12
"""Classes that a message names; the others are counted."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def as_text(column: pa.Array) -> pa.Array:
    """Convert labels to text, numbers with every digit; a column of lists becomes one of lists of text.

    Labels are words, numbers, booleans or dates. Empty words become null.

    Raises:
        DataError: a column of another type, or bytes that are not UTF-8.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    try:
        words = column.cast(pa.list_(pa.string()) if is_list else pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"labels must be words, numbers, booleans, dates, or lists of these; got {kind}") from error
    return words if is_list else pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)


def text_column(labels: Sequence[Any]) -> pa.Array:
    """Labels of Python (words, numbers, booleans, None, or lists of these) as a column of text.

    Raises:
        DataError: a label of another type, or words beside lists.
    """
    known = [label for label in labels if label is not None]
    has_lists = any(isinstance(label, list | tuple) for label in known)
    if not known:
        return pa.nulls(len(labels))
    if has_lists and not all(isinstance(label, list | tuple) for label in known):
        raise DataError("labels must be all words or all lists of words; got both")
    texts = [[_word(entry) for entry in label] if has_lists and label is not None else _word(label) for label in labels]
    return as_text(pa.array(texts, pa.list_(pa.string()) if has_lists else pa.string()))


def _word(value: Any) -> str | None:
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float | np.number):
        return str(value)
    raise DataError(f"labels must be words, numbers, booleans, or lists of these; got {type(value).__name__}")


def number_of(word: str) -> float | None:
    """The finite number that a word spells in decimal, such as `-1.5e3`; None where it spells none."""
    if not _NUMBER.fullmatch(word.strip()):
        return None
    number = float(word)
    return number if np.isfinite(number) else None


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in their order: by number where all are whole numbers, else by the alphabet."""
    names = list(names)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def listed(names: Sequence[str]) -> str:
    """The names of classes as a message shows them: the first ones, and how many more there are."""
    return ", ".join(names[:MAX_NAMED]) + (f", and {len(names) - MAX_NAMED} more" * (len(names) > MAX_NAMED))


def named(counts: Counter[str]) -> str:
    """The names of classes, each with its count, as `listed` has them: `a 12, b 3`."""
    return listed([f"{name} {counts[name]:,}" for name in sort_classes(counts)])


@contextmanager
def placed(where: Callable[[], str]) -> Iterator[None]:
    """Put the place of a record before the message of a `DataError`; it is asked for only then."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where()}: {error}") from error


@dataclass(frozen=True)
class LabelColumn:
    """How the labels of a column are read.

    Attributes:
        is_per_token: each record has one label a token: a list, or a text with one character a token.
        missing: words that mean "no label", beside the empty one.
        option: what a user writes to declare a word missing, for messages; `{}` stands for the word.
    """

    name: str
    is_per_token: bool = False
    missing: tuple[str, ...] = ()
    option: str = "data.missing_labels: [{}]"

    def entries(self, label: Label, length: int | None = None) -> list[str | None]:
        """The words of one record, None where one is missing; a record without a label has none at all.

        Args:
            length: symbols of the record, each of which needs a label; unused where a record has one label.

        Raises:
            DataError: a list where each record has one label, or another number of labels than of symbols.
        """
        if not label or (isinstance(label, str) and label in self.missing):
            return []
        if not self.is_per_token:
            if not isinstance(label, str):
                raise DataError(
                    f"label {self.name!r} must be one word a record; got a list of {len(label)}, the labels of tokens"
                )
            return [label]
        if length is not None and len(label) != length:
            raise DataError(
                f"label {self.name!r} must have one entry for each of the record's {length} symbols; got {len(label)}"
            )
        return [None if not word or word in self.missing else word for word in label]

    def number(self, word: str) -> float:
        """The number that a label spells.

        Raises:
            DataError: it spells none.
        """
        number = number_of(word)
        if number is None:
            raise DataError(
                f"label {self.name!r} must be a finite number; got {word!r} "
                f"(if it stands for a missing label: {self.option.format(word)})"
            )
        return number
