"""Records from tables: CSV, TSV and Parquet with a named payload column, as columns and in blocks.

The kind of table is recognised by its content. Line numbers are those of the user's file, also where quoted
values span lines, where lines are blank or where rows are refused.
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meristem.data.csv_blocks import csv_blocks
from meristem.data.labels import as_text
from meristem.data.open import BOM
from meristem.data.records import LABEL_PREFIX, SCHEMA, SPLIT, ReadOptions, Refusal, Source
from meristem.errors import DataError

PARQUET_MAGIC = b"PAR1"
DELIMITERS = (",", "\t", ";")
_COLUMN_NAME = re.compile(r"[\w.%()/+: -]+")
BYTES = "bytes"
"""Field of a column of structures that holds a file."""

_ROWS_AHEAD, _BYTES_AHEAD = 1024, 32 << 20


@dataclass(frozen=True)
class TableFormat:
    """How a table is written.

    Attributes:
        delimiter: between the values of a CSV file; empty for Parquet.
        columns: names in the header of a CSV file.
    """

    delimiter: str = ""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table to read, by role; empty where there is none."""

    payload: str
    id: str
    labels: tuple[str, ...]
    split: str

    @property
    def all(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys(name for name in (self.payload, self.id, *self.labels, self.split) if name))


def table_format(head: bytes, names: Sequence[str]) -> TableFormat | None:
    """The kind of table that begins with `head`, or None where it is no table.

    Args:
        head: the first bytes; the header of a CSV file must be whole.
        names: column names that make a table of a first line with one of them; a first line of
            two or more column-like words is a table's as well.
    """
    if head.startswith(PARQUET_MAGIC):
        return TableFormat()
    first = next((line for line in head.removeprefix(BOM).splitlines() if line), b"")
    try:
        text = first.decode("utf-8")
    except UnicodeDecodeError:
        return None
    known = {name.lower() for name in names}
    parsed = []
    for delimiter in DELIMITERS:
        columns = tuple(next(csv.reader([text], delimiter=delimiter), ()))
        if known & {name.lower() for name in columns}:
            return TableFormat(delimiter, columns)
        parsed.append(TableFormat(delimiter, columns))
    best = max(parsed, key=lambda form: len(form.columns))
    words = [_COLUMN_NAME.fullmatch(name) for name in best.columns]
    return best if len(words) > 1 and all(words) else None


def read_table(
    stream: io.BufferedReader,
    source: Source,
    options: ReadOptions,
    form: TableFormat,
    payload_names: Sequence[str],
    holds_files: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Read the records of a table.

    A record without an id column has its number in the file, from 1, as its id. A row with no payload is
    refused as an empty record.

    Args:
        stream: the opened source, at its start.
        payload_names: usual names of the payload column, lower case, the first found is taken.
        holds_files: payloads are files. A column of bytes stays one (also in the field `bytes` of a structure); one of
            text holds paths, which are the ids where no column names them.

    Raises:
        DataError: a column that is not there, a damaged file, or a refused record when there is no `on_error`.
    """
    if form.delimiter:
        yield from _read_csv(stream, source, options, form, payload_names, holds_files)
    else:
        yield from _read_parquet(stream, source, options, payload_names, holds_files)


def batch_of(
    ids: pa.Array, payloads: pa.Array, source: Source, lines: np.ndarray, extra: dict[str, pa.Array] | None = None
) -> pa.RecordBatch:
    """A record batch of `SCHEMA` and the columns in `extra`."""
    extra = extra or {}
    files = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(ids), np.int32)), pa.array([source.name]))
    schema = SCHEMA.set(1, pa.field("payload", payloads.type, nullable=False))
    schema = pa.schema([*schema, *(pa.field(name, column.type) for name, column in extra.items())])
    columns = [ids, payloads, files, pa.array(lines, pa.int64()), *extra.values()]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def keep_rows(batch: pa.RecordBatch, refused: np.ndarray) -> pa.RecordBatch:
    """The batch without the rows whose indices are in `refused`."""
    if not len(refused):
        return batch
    is_kept = np.ones(batch.num_rows, bool)
    is_kept[refused] = False
    return batch.filter(pa.array(is_kept))


def _find_columns(columns: Sequence[str], where: str, options: ReadOptions, payload_names: Sequence[str]) -> _Columns:
    listed = ", ".join(columns)
    by_lower = {name.lower(): name for name in reversed(columns)}
    payload = options.payload_column or next((by_lower[n] for n in payload_names if n in by_lower), "")
    if not payload:
        raise DataError(
            f"{where}: a table needs a payload column named {', '.join(payload_names[:3])} or the like; "
            f"columns: {listed} (name one with payload_column)"
        )
    found = _Columns(
        payload=payload,
        id=options.id_column or ("id" if "id" in columns else ""),
        labels=options.label_columns,
        split=options.split_column,
    )
    for name in found.all:
        if columns.count(name) != 1:
            reason = "no column" if name not in columns else "more than one column"
            raise DataError(f"{where}: {reason} {name!r}; columns: {listed}")
    return found


def _assemble(
    table: pa.RecordBatch,
    wanted: _Columns,
    numbers: np.ndarray,
    lines: np.ndarray,
    source: Source,
    options: ReadOptions,
    holds_files: bool,
    is_csv: bool,
) -> pa.RecordBatch:
    """Rows of a user's table as a record batch, without the rows that have to be refused."""
    reasons: dict[int, str] = {}
    is_binary = holds_files and not is_csv and not _is_text(table.column(wanted.payload).type)
    payloads = _bytes(table, wanted.payload) if is_binary else _text(table, wanted.payload, pa.large_string(), reasons)
    ids = pa.array(numbers).cast(pa.string())
    if wanted.id or (holds_files and not is_binary):
        named = _text(table, wanted.id or wanted.payload, pa.string(), reasons)
        ids = pc.if_else(_is_empty(named), ids, named)
    extra = {LABEL_PREFIX + name: _label(table, name, source, reasons) for name in wanted.labels}
    if wanted.split:
        extra[SPLIT] = _text(table, wanted.split, pa.string(), reasons)
    for row in np.flatnonzero(_is_empty(payloads).to_numpy(zero_copy_only=False)).tolist():
        reasons.setdefault(row, f"empty record (nothing in column {wanted.payload!r})")
    for row in sorted(reasons):
        options.refuse(Refusal(source.name, int(lines[row]), ids[row].as_py(), reasons[row]))
    batch = batch_of(ids, pc.fill_null(payloads, b"" if is_binary else ""), source, lines, extra)
    return keep_rows(batch, np.array(sorted(reasons), np.int64))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _bytes(table: pa.RecordBatch, name: str) -> pa.Array:
    """A column of bytes; of a column of structures, the field that holds them."""
    column = table.column(name)
    return (pc.struct_field(column, BYTES) if pa.types.is_struct(column.type) else column).cast(pa.large_binary())


def _is_empty(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.fill_null(pc.binary_length(texts), 0), 0)


def _text(table: pa.RecordBatch, name: str, to: pa.DataType, reasons: dict[int, str]) -> pa.Array:
    """A column as text; rows that are not UTF-8 go to `reasons` and become empty."""
    column = table.column(name)
    try:
        return column.cast(to)
    except pa.ArrowInvalid:
        values = []
        for row, value in enumerate(column.to_pylist()):
            try:
                values.append(value.decode("utf-8") if value is not None else None)
            except UnicodeDecodeError as error:
                reasons.setdefault(row, f"not UTF-8: byte 0x{value[error.start]:02x} in column {name!r}")
                values.append("")
        return pa.array(values, to)


def _label(table: pa.RecordBatch, name: str, source: Source, reasons: dict[int, str]) -> pa.Array:
    """A label column as text, whatever the table's types are."""
    column = table.column(name)
    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    try:
        return as_text(_text(table, name, pa.string(), reasons) if is_bytes else column)
    except DataError as error:
        raise DataError(f"{source.name}: column {name!r}: {error}") from error


# CSV and TSV


def _read_csv(
    stream: IO[bytes],
    source: Source,
    options: ReadOptions,
    form: TableFormat,
    payload_names: Sequence[str],
    holds_files: bool,
) -> Iterator[pa.RecordBatch]:
    wanted = _find_columns(form.columns, f"{source.name}:1", options, payload_names)
    for table, lines, numbers in csv_blocks(stream, source, options, form.delimiter, wanted.all, options.refuse):
        batch = _assemble(table, wanted, numbers - 1, lines, source, options, holds_files, is_csv=True)
        if batch.num_rows:
            yield batch


# Parquet


def _read_parquet(
    stream: IO[bytes], source: Source, options: ReadOptions, payload_names: Sequence[str], holds_files: bool
) -> Iterator[pa.RecordBatch]:
    with tempfile.TemporaryFile() as copy:
        # Parquet is read from its end: what cannot be wound back is copied first
        while block := stream.read(1 << 20):
            copy.write(block)
        copy.seek(0)
        try:
            file = pq.ParquetFile(copy)
            wanted = _find_columns(file.schema_arrow.names, source.name, options, payload_names)
            for name in (wanted.payload, wanted.id, wanted.split):
                kind = file.schema_arrow.field(name).type if name else pa.string()
                if holds_files and name == wanted.payload and pa.types.is_struct(kind):
                    if kind.get_field_index(BYTES) < 0:
                        raise DataError(f"{source.name}: column {name!r} must have a field {BYTES!r}; got {kind}")
                elif pa.types.is_nested(kind):
                    raise DataError(f"{source.name}: column {name!r} must hold text; got {kind}")
            first_row = 0
            for table in file.iter_batches(_rows_ahead(file), columns=wanted.all):
                rows = np.arange(first_row + 1, first_row + 1 + table.num_rows)
                batch = _assemble(table, wanted, rows, rows, source, options, holds_files, is_csv=False)
                first_row += table.num_rows
                if batch.num_rows:
                    yield batch
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{source.name}: damaged Parquet file: {' '.join(str(error).split())}") from error


def _rows_ahead(file: pq.ParquetFile) -> int:
    """Rows that are read at once: fewer where they are large."""
    facts = file.metadata
    num_bytes = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    return max(1, min(_ROWS_AHEAD, _BYTES_AHEAD * max(facts.num_rows, 1) // max(num_bytes, 1)))
