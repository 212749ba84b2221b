"""The records of a run, in the parts of its split, as an objective sees them before training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.types import Record

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

    def payload_lengths(self) -> np.ndarray:
        """`[N]` characters of each payload of the first input, or bytes where payloads are bytes."""
        return np.concatenate([np.zeros(0, np.int64), *(_lengths(block) for block in self._payloads())])

    def where(self, row: int) -> str:
        """`file:line` of a record by its place in this part, for messages."""
        return self.store.where(int(self.rows[row]))

    def _payloads(self) -> Iterator[pa.Array]:
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.store.payloads(self.rows[start : start + BLOCK_ROWS], self.store.inputs[0])


def _lengths(payloads: pa.Array) -> np.ndarray:
    is_bytes = pa.types.is_large_binary(payloads.type) or pa.types.is_binary(payloads.type)
    return (pc.binary_length if is_bytes else pc.utf8_length)(payloads).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True, eq=False)
class RunData:
    """What an objective may learn from, and has to check, before training.

    Attributes:
        tokenizer: makes the tokens of a run.
        parts: the records by the name of their part: `train`, and `validation` and `test` where the split has them.
        missing_labels: words that mean "no label", as `data.missing_labels` has them.
    """

    tokenizer: Tokenizer
    parts: Mapping[str, Part] = field(default_factory=dict)
    missing_labels: tuple[str, ...] = ()
