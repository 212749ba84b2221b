"""The records of a run, in the parts of its split, as an objective sees them before training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.types import Payload, Record, Tokens

BLOCK_ROWS = 1 << 14
"""Payloads that are looked at together."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a store that make one part of a split: training, validation or test.

    Attributes:
        store: of the records.
        rows: `[N]` rows of the store.
    """

    store: RecordStore
    rows: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Part":
        """All of these records, in memory."""
        return cls(RecordStore.of(records), np.arange(len(records)))

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self, name: str) -> list[str | list[str | None] | None]:
        """A label of each record as text; None where it is missing."""
        if name not in self.store.label_columns:  # of records in memory that have none
            return [None] * len(self)
        found: list[str | list[str | None] | None] = self.store.labels(name, self.rows).to_pylist()
        return found

    def inputs(self, name: str) -> Iterator[Payload]:
        """The payloads of an input, in order."""
        for block in self._payloads(name):
            yield from block.to_pylist()

    def payload_lengths(self) -> np.ndarray:
        """`[N]` characters of each payload of the first input, or bytes where payloads are bytes."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(_lengths(block) for block in self._payloads(self.store.inputs[0]))]
        )

    def where(self, row: int) -> str:
        """`file:line` of a record by its place in this part, for messages."""
        return self.store.where(int(self.rows[row]))

    def _payloads(self, name: str) -> Iterator[pa.Array]:
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.store.payloads(self.rows[start : start + BLOCK_ROWS], name)


def _lengths(payloads: pa.Array) -> np.ndarray:
    is_bytes = pa.types.is_large_binary(payloads.type) or pa.types.is_binary(payloads.type)
    return (pc.binary_length if is_bytes else pc.utf8_length)(payloads).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True, eq=False)
class RunData:
    """What an objective may learn from, and has to check, before training.

    Attributes:
        tokenizer: makes the tokens of every input that is not in `others`.
        parts: the records by the name of their part: `train`, and `validation` and `test` where the split has them.
        missing_labels: words that mean "no label", as `data.missing_labels` has them.
        others: tokenizers of the inputs that another domain, or other options, read.
    """

    tokenizer: Tokenizer
    parts: Mapping[str, Part] = field(default_factory=dict)
    missing_labels: tuple[str, ...] = ()
    others: Mapping[str, Tokenizer] = field(default_factory=dict)

    def tokenizer_of(self, name: str) -> Tokenizer:
        """The tokenizer that reads an input."""
        return self.others.get(name, self.tokenizer)


@dataclass(frozen=True, eq=False)
class Encoder:
    """Gives an objective the tokens of the inputs of one record, and those of other payloads.

    Attributes:
        ready: tokens of the record's inputs by name; a window of them where the record is too long.
        tokenizers: tokenizer of each input.
    """

    ready: Mapping[str, Tokens]
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)

    def __call__(self, name: str, payload: Payload | None = None) -> Tokens:
        """The tokens of an input.

        Args:
            payload: read by the tokenizer of that input, whole; None for the record's own.

        Raises:
            DataError: the tokenizer refuses the payload.
        """
        return self.ready[name] if payload is None else self.tokenizers[name].encode(payload)
