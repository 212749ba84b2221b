"""Records as columns: what a domain's `read` takes and yields.

Large inputs move as Arrow record batches; a `Record` is a row of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from meristem.data.labels import as_text
from meristem.errors import DataError
from meristem.types import Record

LABEL_PREFIX = "label:"
"""A label column `score` of the user's file is the column `label:score` of a record batch."""

SPLIT = "split"
"""The column of a record batch that names the part a record belongs to, where a split column was asked for."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("payload", pa.large_string(), nullable=False),  # or large_binary
        # where it ends in "/", it holds a file for each record, under its id
        pa.field("file", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("line", pa.int64(), nullable=False),  # from 1; the row of a Parquet file; 0 for none
    ]
)
"""The columns that every record batch begins with; label columns follow."""


@dataclass(frozen=True)
class Source:
    """An input that records are read from.

    Attributes:
        path: a file, or `-` for standard input; where the domain says so, a folder of files.
    """

    path: str

    @property
    def is_stdin(self) -> bool:
        return self.path == "-"

    @property
    def name(self) -> str:
        """As messages call it."""
        return "<stdin>" if self.is_stdin else self.path

    @property
    def within(self) -> str:
        """Column `file` of records that are files within this source: a folder, or an archive."""
        return f"{self.name.rstrip('/')}/"


@dataclass(frozen=True)
class Refusal:
    """A record, or a part of a file, that could not be used: counted and named, never lost in silence."""

    file: str
    line: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    @property
    def where(self) -> str:
        """Where it stands, as messages say it."""
        return place_of(self.file, self.line, self.id)


@dataclass(frozen=True)
class ReadOptions:
    """How to read a source; the same for every domain.

    Attributes:
        payload_column: column of a table (CSV, TSV, Parquet) that holds the payload; empty for the
            domain's usual name.
        id_column: column of a table that holds the id; empty for `id` where there is one, else the row number.
        label_columns: columns of a table to carry along as labels.
        split_column: column of a table that names the part a record belongs to (train, validation, test).
        on_error: called with each refused record when set; when None a refusal is a `DataError`.
        batch_bytes: payload bytes that a record batch holds, about.
        is_checking: payloads are looked at as closely as the tokenizer will, so that none is refused later on; False
            where all are encoded next, in any case.
    """

    payload_column: str = ""
    id_column: str = ""
    label_columns: tuple[str, ...] = ()
    split_column: str = ""
    on_error: Callable[[Refusal], None] | None = field(default=None, compare=False)
    batch_bytes: int = 4 << 20
    is_checking: bool = True

    def refuse(self, refusal: Refusal) -> None:
        """Report a refused record to `on_error`.

        Raises:
            DataError: there is no `on_error`.
        """
        if self.on_error is None:
            raise DataError(str(refusal))
        self.on_error(refusal)


def labels_of(batch: pa.RecordBatch, column: str) -> pa.Array:
    """A label column of a record batch as text, whatever type the reader gave it.

    Raises:
        DataError: names the file and the column that has no labels.
    """
    try:
        return as_text(batch.column(column))
    except DataError as error:
        file = batch.column("file")[0].as_py()
        raise DataError(f"{file}: column {column.removeprefix(LABEL_PREFIX)!r}: {error}") from error


def place_of(file: str, line: int, id: str) -> str:
    """Where a record stands, as messages say it: `file:line`, or the name of its own file."""
    if line:
        return f"{file}:{line}"
    return f"{file}{id}" if file.endswith("/") else file


def record_at(batch: pa.RecordBatch, row: int) -> Record:
    """Row `row` of a record batch as a `Record`; missing labels are left out."""
    labels = {
        name.removeprefix(LABEL_PREFIX): labels_of(batch.slice(row, 1), name)[0].as_py()
        for name in batch.schema.names
        if name.startswith(LABEL_PREFIX)
    }
    id, payload, file, line = (batch.column(name)[row].as_py() for name in ("id", "payload", "file", "line"))
    return Record(
        id=id,
        payload=payload,
        labels={name: value for name, value in labels.items() if value is not None},
        source=place_of(file, line, id),
    )
