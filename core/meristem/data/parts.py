"""The records of a run, in the parts of its split, as an objective sees them before training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.payloads import is_text
from meristem.data.records import Refusal
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.errors import DataError
from meristem.types import Payload, Record, Tokens

BLOCK_ROWS = 1 << 14
"""Payloads that are looked at together."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a store that make one part of a split: training, validation or test.

    Attributes:
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
        return self.store.labels(name, self.rows).to_pylist()

    def inputs(self, name: str) -> Iterator[Payload]:
        """The payloads of an input, in order."""
        for block in self._payloads(name):
            yield from block.to_pylist()

    def payload_lengths(self) -> np.ndarray:
        """`[N]` characters of each payload of the first input, or bytes where payloads are bytes."""
        return np.concatenate([np.zeros(0, np.int64), *map(_lengths, self._payloads(self.store.inputs[0]))])

    def where(self, row: int) -> str:
        """`file:line` of a record by its place in this part, for messages."""
        return self.store.where(int(self.rows[row]))

    def _payloads(self, name: str) -> Iterator[pa.Array]:
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.store.payloads(self.rows[start : start + BLOCK_ROWS], name)


def _lengths(payloads: pa.Array) -> np.ndarray:
    count = pc.utf8_length if is_text(payloads.type) else pc.binary_length
    return count(payloads).to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True, eq=False)
class RunData:
    """What an objective may learn from, and has to check, before training.

    Attributes:
        tokenizer: makes the tokens of every input that is not in `others`.
        parts: the records by the name of their part: `train`, and `validation` and `test` where the split has them.
        missing_labels: words that mean "no label", as `data.missing_labels` has them.
        others: tokenizers of the inputs that another domain, or other options, read.
        on_error: called with each record that is left out; None where a record that cannot be used is an error.
    """

    tokenizer: Tokenizer
    parts: dict[str, Part] = field(default_factory=dict)
    missing_labels: tuple[str, ...] = ()
    others: Mapping[str, Tokenizer] = field(default_factory=dict)
    on_error: Callable[[Refusal], None] | None = None
    _refused: dict[str, dict[int, str]] = field(default_factory=dict, init=False)

    def tokenizer_of(self, name: str) -> Tokenizer:
        return self.others.get(name, self.tokenizer)

    def refuse(self, part: str, place: int, reason: str) -> None:
        """Say that the record at a place of a part cannot be used; the next `leave_out` takes it out of the part.

        Raises:
            DataError: no record is to be left out.
        """
        if self.on_error is None:
            raise DataError(f"{self.parts[part].where(place)}: {reason}")
        self._refused.setdefault(part, {}).setdefault(place, reason)

    def leave_out(self) -> bool:
        """Remove the refused records from `parts` and report each; return whether there were any."""
        refused = dict(self._refused)
        self._refused.clear()
        for name, reasons in refused.items():
            part = self.parts[name]
            for place in sorted(reasons):
                self.on_error(part.store.refusal(int(part.rows[place]), reasons[place]))  # type: ignore[misc]
            if len(reasons) == len(part):
                raise DataError(
                    f"{part.where(0)}: no record of the {name} part is left; all were refused: {reasons[0]}"
                )
            self.parts[name] = Part(part.store, np.delete(part.rows, list(reasons)))
        return bool(refused)


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
        """The tokens of an input: of the record's own, or of another payload as a whole.

        Raises:
            DataError: the tokenizer refuses the payload.
        """
        return self.ready[name] if payload is None else self.tokenizers[name].encode(payload)
