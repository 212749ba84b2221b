"""Tokenizes the inputs of records for a model, in this process or in several worker processes."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from meristem.data.pack import column_of
from meristem.data.records import INPUT_PREFIX, records_of
from meristem.data.tokenizer import RefusedSymbol, Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError, DataError
from meristem.model_directory import ModelCard
from meristem.registry import find
from meristem.types import Record, TokenColumn, Tokens

SIDES = ("source", "target")
"""Inputs of an encoder-decoder that was not trained on records of two inputs."""


Encoded = tuple[TokenColumn, dict[int, str]]
"""What is read of the records of a table that can be read, and the rows of the others with the reason of each. Where
none is to be skipped: an empty column, and the first such row."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How a record becomes the token sequences that a model reads. Can be pickled for worker processes.

    Attributes:
        tokenizers: of each input that is read, by its name. Of two that are not joined, the first is what an encoder
            reads, and the second belongs to the decoder.
        join: makes one sequence of the tokens of the inputs of a record, by name; None for none.
        views: records that are read in the place of each record; None for the record itself.
    """

    tokenizers: Mapping[str, Tokenizer]
    join: Callable[[Mapping[str, Tokens]], Tokens] | None = None
    views: Views | None = None

    @classmethod
    def of(cls, card: ModelCard) -> "Reading":
        """One sequence of each record: of all inputs, where the model's objective joins them, else of the first.

        Raises:
            ConfigError: no installed package offers the objective.
        """
        names = tuple(card.inputs)
        if not card.joined_by:
            return cls({names[0]: card.tokenizer_of(names[0])})
        objective = find("meristem.objectives", card.joined_by)
        tokenizers = {name: card.tokenizer_of(name) for name in objective.joined_inputs}
        return cls(tokenizers, partial(objective.join, config=card.architecture))

    @classmethod
    def of_sides(cls, card: ModelCard) -> "Reading":
        """The source and the target of each record, for an encoder-decoder."""
        names = tuple(card.inputs) if len(card.inputs) == 2 else SIDES
        return cls({name: card.tokenizer_of(name) if name in card.inputs else card.tokenizer for name in names})

    def column(self, table: pa.RecordBatch) -> TokenColumn:
        """Tokenize each record of a table.

        Raises:
            RefusedSymbol: names the row of the table that cannot be read.
        """
        if self.views is not None:
            return self._viewed(self.views, records_of(table.to_pydict()))
        return self._read({name: table[INPUT_PREFIX + name] for name in self.tokenizers})

    def _viewed(self, views: Views, records: Iterable[Record]) -> TokenColumn:
        seen: list[tuple[Record, ...]] = []
        for row, record in enumerate(records):
            try:
                seen.append(views.views(record, None))
            except DataError as error:
                raise _Refused(row, str(error)) from error
            if len(seen[row]) != len(seen[0]):
                raise ConfigError(
                    f"the views of a domain must be equally many for every record; got {len(seen[0])} and, of "
                    f"{record.source or record.id}, {len(seen[row])}"
                )
        of_views = [
            self._read({name: [one.inputs[name] for one in view] for name in self.tokenizers}) for view in zip(*seen)
        ]
        return replace(of_views[0], views=tuple(of_views[1:]))

    def values(self, records: Sequence[Any]) -> TokenColumn:
        """Tokenize records that are passed from Python.

        Args:
            records: payloads, as `Tokenizer.encode_values` takes them; of several inputs, a mapping of their names to
                payloads for each record.

        Raises:
            RefusedSymbol: names the record that cannot be read.
        """
        names = tuple(self.tokenizers)
        if len(names) == 1:
            payloads = {names[0]: records}
        else:
            for row, record in enumerate(records):
                got = list(record) if isinstance(record, Mapping) else type(record).__name__
                if not isinstance(record, Mapping) or set(record) != set(names):
                    raise _Refused(row, f"must be a mapping of {' and '.join(names)} to payloads; got {got}")
            payloads = {name: [record[name] for record in records] for name in names}
        # with views too, so that what no tokenizer takes is refused before views meet it
        column = self._read(payloads)
        if self.views is None:
            return column
        rows = enumerate(zip(*payloads.values()))
        return self._viewed(self.views, [Record(f"sequence {row}", dict(zip(names, one))) for row, one in rows])

    def _read(self, payloads: "Mapping[str, pa.Array | Sequence[Any]]") -> TokenColumn:
        columns: dict[str, TokenColumn] = {}
        for name, tokenizer in self.tokenizers.items():
            try:
                encode = tokenizer.encode_column if isinstance(payloads[name], pa.Array) else tokenizer.encode_values
                columns[name] = encode(payloads[name])
            except RefusedSymbol as error:
                reason = str(error) if len(self.tokenizers) == 1 else f"input {name!r}: {error}"
                raise _Refused(error.row, reason) from error
        first, *others = columns.values()
        if self.join is not None:
            sequences = [
                self.join({name: self.tokenizers[name].tokens_at(column, row) for name, column in columns.items()})
                for row in range(len(first))
            ]
            return column_of(sequences, sum((Counter(one.replaced) for one in columns.values()), Counter()))
        return replace(others[0], source=first) if others else first


class _Refused(RefusedSymbol):
    """A refused row with a complete message, to which no position is added."""

    def __init__(self, row: int, reason: str):
        DataError.__init__(self, reason)
        self.row = row


def sides_of(column: TokenColumn) -> tuple[TokenColumn, ...]:
    """A column, and all columns that it refers to: other views of its records, and what an encoder reads."""
    others = (*column.views, *([] if column.source is None else [column.source]))
    return (column, *(side for other in others for side in sides_of(other)))


def encode(reading: Reading, table: pa.RecordBatch, is_skipping: bool) -> Encoded:
    """Tokenize the records of a table, leaving out those that cannot be tokenized."""
    refused: dict[int, str] = {}
    while True:
        left = np.setdiff1d(np.arange(len(table)), list(refused))
        try:
            return reading.column(table.take(pa.array(left)) if refused else table), refused
        except RefusedSymbol as error:
            refused[int(left[error.row])] = str(error)
            if not is_skipping:
                return column_of([]), refused


def encode_tables(
    tables: Iterable[pa.RecordBatch], reading: Reading, is_skipping: bool, workers: int = 0
) -> Iterator[tuple[pa.RecordBatch, Encoded]]:
    """Tokenize tables; yields each table with its tokens, in order.

    Args:
        is_skipping: refused records are left out; else encoding a table ends at the first.
        workers: processes that encode; 0 for this one. Without effect on what comes.
    """
    if not workers:
        for table in tables:
            yield table, encode(reading, table, is_skipping)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (reading, is_skipping)) as pool:
        waiting: deque = deque()
        try:
            for table in tables:
                waiting.append((table, pool.submit(_encode, table)))
                if len(waiting) > 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_own: tuple[Reading, bool] | None = None
"""State of a worker process: the reading, and whether records that cannot be read are skipped."""


def _start(reading: Reading, is_skipping: bool) -> None:
    global _own
    _own = (reading, is_skipping)


def _encode(table: pa.RecordBatch) -> Encoded:
    assert _own is not None
    return encode(_own[0], table, _own[1])
