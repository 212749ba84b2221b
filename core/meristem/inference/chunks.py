"""Inputs as a stream of chunks, the unit of work and of what is written.

Where a chunk ends depends on the records before it and on the constants here alone: not on budgets, devices or
how a file is read. So a run that was killed finds the same chunks again.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from meristem.data.payloads import is_sliced, values_of
from meristem.data.records import INPUT_PREFIX, SCHEMA, ReadOptions, Refusal, Source, place_of
from meristem.data.tokenizer import column_bytes
from meristem.domain import Domain
from meristem.errors import DataError
from meristem.inference.encoding import Reading, encode_tables, sides_of
from meristem.types import TokenColumn

CHUNK_RECORDS = 1024
"""Records of a chunk at most: what a killed run computes again."""

CHUNK_SYMBOLS = 1 << 17
"""Payload symbols of a chunk at most, about, but for a single longer record."""

MAX_NAMED_REFUSALS = 10_000
"""Refused records that are kept by name; the rest are counted, since memory must stay flat."""


@dataclass(frozen=True)
class Chunk:
    """Records that are worked on together.

    Attributes:
        payloads: of their last input.
        lines: where each stands in its file.
        digest: of all records up to the last of this chunk.
    """

    index: int
    ids: pa.Array
    column: TokenColumn
    payloads: pa.Array
    files: pa.Array
    lines: pa.Array
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, row: int) -> str:
        """A record as messages call it."""
        file, line, id = (column[row].as_py() for column in (self.files, self.lines, self.ids))
        return f"{place_of(file, line, id)}: record {id!r}"


class ChunkReader:
    """Reads inputs once, in order, as chunks; counts as it goes.

    Args:
        reading: what the model reads of a record.
        options: how to read; its `on_error` is replaced, and its `columns` are those of the inputs in `reading`.
        is_skipping: refused records are counted and left out; else they are errors.
        max_symbols: payload symbols of a chunk at most.
        workers: processes that encode payloads; 0 for this one.
        unfit: says which rows of a column are to be refused, and why.

    Attributes:
        num_records: read so far, refused ones left out.
        num_symbols: payload tokens of these, of all that is read of them.
        replaced: symbols that the tokenizer replaced, by `"old>new"`.
        refused: the first refused records.
        per_input: records read from each input, in their order.
    """

    def __init__(
        self,
        domain: Domain,
        reading: Reading,
        inputs: Sequence[str],
        options: ReadOptions,
        is_skipping: bool = False,
        max_symbols: int = CHUNK_SYMBOLS,
        workers: int = 0,
        unfit: Callable[[TokenColumn], Mapping[int, str]] = lambda column: {},
    ):
        self._num_workers, self._unfit = workers, unfit
        self._domain, self._reading, self._max_symbols = domain, reading, max_symbols
        self._columns = [INPUT_PREFIX + name for name in reading.tokenizers]
        self._inputs, self._is_skipping = tuple(inputs), is_skipping
        # every payload is encoded here, which finds what is wrong with it; a chunk anew for each that is left out
        self.options = replace(options, on_error=self._refuse if is_skipping else None, is_checking=is_skipping)
        self._digest = _Digest(["id", *self._columns])
        self.num_records = self.num_symbols = self.num_refused = 0
        self.replaced: Counter[str] = Counter()
        self.refused: list[Refusal] = []
        self.per_input = [0] * len(self._inputs)

    def __iter__(self) -> Iterator[Chunk]:
        """Read all inputs; raises DataError for an input or a record that cannot be used, and where there is none."""
        tables = encode_tables(self._cut(), self._reading, self._is_skipping, self._num_workers)
        for index, (table, (column, refused)) in enumerate(tables):
            self._digest.add(table)
            digest = self.digest
            for side in sides_of(column):
                self.replaced.update(side.replaced)
            table = self._without(table, refused)
            if unfit := self._unfit(column):
                table = self._without(table, unfit)
                column = column.take(np.setdiff1d(np.arange(len(column)), list(unfit)))
            self.num_records += table.num_rows
            for side in sides_of(column):
                self.num_symbols += int(side.payload_lengths.sum())
            yield Chunk(index, table["id"], column, table[self._columns[-1]], table["file"], table["line"], digest)
        if not self.num_records:
            why = f": all {self.num_refused} were refused, {self.refused[0]}" if self.num_refused else ""
            raise DataError(f"{', '.join(Source(name).name for name in self._inputs)}: no record to work on{why}")

    @property
    def digest(self) -> str:
        """Of all records read so far."""
        return self._digest.value()

    def _cut(self) -> Iterator[pa.RecordBatch]:
        held: list[pa.RecordBatch] = []
        num_records = num_symbols = 0
        for batch in self._batches():
            ends = np.zeros(batch.num_rows, np.int64)
            for name, tokenizer in zip(self._columns, self._reading.tokenizers.values()):
                sizes = np.diff(column_bytes(batch.column(name))[1])
                ends += np.cumsum(tokenizer.length_of(sizes) - sum(tokenizer.num_special))
            at = 0
            while at < batch.num_rows:
                used = int(ends[at - 1]) if at else 0
                room = used + self._max_symbols - num_symbols
                stop = min(int(np.searchsorted(ends, room, side="right")), at + CHUNK_RECORDS - num_records)
                if stop <= at and not held:
                    stop = at + 1
                if stop > at:
                    held.append(batch.slice(at, stop - at))
                    num_records, num_symbols = num_records + stop - at, num_symbols + int(ends[stop - 1]) - used
                    at = stop
                if at < batch.num_rows or num_records == CHUNK_RECORDS:
                    yield pa.concat_batches(held)
                    held, num_records, num_symbols = [], 0, 0
        if held:
            yield pa.concat_batches(held)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for number, name in enumerate(self._inputs):
            for batch in self._domain.reader.read(Source(name), self.options):
                self.per_input[number] += batch.num_rows
                columns = {name: batch.column(name) for name in (*SCHEMA.names, *self._columns)}
                for name in self._columns:
                    if is_sliced(columns[name].type):
                        columns[name] = self._domain.reader.fetch(values_of(columns[name]))
                columns["file"] = columns["file"].cast(pa.string())  # dictionaries of two files do not go together
                yield pa.RecordBatch.from_pydict(columns)

    def _without(self, table: pa.RecordBatch, refused: Mapping[int, str]) -> pa.RecordBatch:
        """A table without the rows that are refused, for the reasons given; DataError where none is to be skipped."""
        for row, reason in refused.items():
            file, line, id = (table[name][row].as_py() for name in ("file", "line", "id"))
            refusal = Refusal(file, line, id, reason)
            if not self._is_skipping:
                raise DataError(f"{refusal.where}: record {id!r}: {reason}")
            self._refuse(refusal)
        kept = np.setdiff1d(np.arange(len(table)), list(refused))
        return table.take(pa.array(kept)) if refused else table

    def _refuse(self, refusal: Refusal) -> None:
        self.num_refused += 1
        if len(self.refused) < MAX_NAMED_REFUSALS:
            self.refused.append(refusal)


class _Digest:
    """A hash of some columns of a stream of records; it does not depend on how the stream is cut into batches."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._parts = [hashlib.blake2b(digest_size=16) for _ in range(len(names) + 1)]

    def add(self, table: pa.RecordBatch) -> None:
        texts = [column_bytes(table[name]) for name in self._names]
        for digest, (text, _) in zip(self._parts, texts):
            digest.update(text.data)
        self._parts[-1].update(np.stack([np.diff(bounds) for _, bounds in texts], axis=1).tobytes())

    def value(self) -> str:
        whole = hashlib.blake2b(digest_size=16)
        for digest in self._parts:
            whole.update(digest.digest())
        return whole.hexdigest()
