"""A column of texts beside the payload, read by the payload's tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.errors import DataError
from meristem.types import Record

NUM_MEASURED = 1000
"""Texts whose length is measured to plan packs."""


@dataclass(frozen=True)
class TextColumn:
    """Texts of a column as symbols.

    Attributes:
        name: of the column.
        tokenizer: of the payload.
        mean_tokens: of the training records' texts, closing rows included, for planning packs.
    """

    name: str
    tokenizer: Tokenizer
    mean_tokens: float = 0.0

    @classmethod
    def learn(cls, name: str, tokenizer: Tokenizer, texts: Sequence[Any], where: Callable[[int], str]) -> "TextColumn":
        """See that every training record has a text, and measure some.

        Raises:
            DataError: a record without one, or with one that the tokenizer refuses, by file and line.
        """
        column = cls(name, tokenizer)
        for row, text in enumerate(texts):
            column.require(text, where(row))
        step = max(1, len(texts) // NUM_MEASURED)
        lengths = [len(column.encode(texts[row], where(row))) for row in range(0, len(texts), step)]
        return cls(name, tokenizer, float(np.mean(lengths)))

    def text_of(self, record: Record) -> str:
        """The text of a record."""
        return self.require(record.labels.get(self.name), record.source)

    def require(self, value: Any, source: str) -> str:
        if not isinstance(value, str) or not value:
            raise DataError(f"{source}: column {self.name!r} must hold a text; got {value!r}")
        return value

    def encode(self, text: str, source: str) -> np.ndarray:
        """`[n]` symbols of a text without the special rows before it, but with those behind it."""
        try:
            return self.tokenizer.encode(text).ids[self.tokenizer.num_special[0] :]
        except DataError as error:
            raise DataError(f"{source}: column {self.name!r}: {error}") from error
