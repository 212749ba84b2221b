"""A column of texts beside the payload, read by the payload's tokenizer."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from meristem.data.parts import RunData
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
    def learn(cls, name: str, data: RunData) -> "TextColumn":
        """See that every record has a text, and measure some of the training records'.

        Raises:
            DataError: a record without one, or with one that the tokenizer refuses, by file and line.
        """
        column = cls(name, data.tokenizer)
        for part in data.parts.values():
            for row, text in enumerate(part.labels(name)):
                if not text or not isinstance(text, str):
                    column.require(text, part.where(row))
        train = data.parts["train"]
        texts, step = train.labels(name), max(1, len(train) // NUM_MEASURED)
        lengths = [len(column.encode(texts[row], train.where(row))) for row in range(0, len(texts), step)]  # type: ignore[arg-type]
        return cls(name, data.tokenizer, float(np.mean(lengths)))

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
