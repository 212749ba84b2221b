"""Records from tables: CSV, TSV and Parquet with named columns of payloads, as columns and in blocks.

The kind of table is recognised by its content. Line numbers are those of the user's file, also where quoted
values span lines, where lines are blank or where rows are refused.
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meristem.data.labels import as_text
from meristem.data.reading.csv_blocks import csv_blocks
from meristem.data.reading.open import BOM
from meristem.data.records import GROUP, LABEL_PREFIX, SPLIT, ReadOptions, Refusal, Source, batch_of
from meristem.errors import DataError
from meristem.types import INPUT

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
    """Which columns of a table to read, by role; empty where there is none.

    Attributes:
        inputs: column of each input.
    """

    inputs: Mapping[str, str]
    id: str
    labels: tuple[str, ...]
    split: str
    group: str

    @property
    def all(self) -> list[str]:
        """Each column once."""
        named = (*self.inputs.values(), self.id, *self.labels, self.split, self.group)
        return list(dict.fromkeys(name for name in named if name))


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
        payload_names: usual names of the first input's column, lower case, the first found is taken.
        holds_files: payloads are files, but for foreign inputs. A column of bytes stays one (also in the field `bytes`
            of a structure); one of text holds paths, which are the ids where no column names them.

    Raises:
        DataError: a column that is not there, a damaged file, or a refused record when there is no `on_error`.
    """
    if form.delimiter:
        yield from _read_csv(stream, source, options, form, payload_names, holds_files)
    else:
        yield from _read_parquet(stream, source, options, payload_names, holds_files)


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
    inputs = {}
    for name, given in options.columns.items():
        usual = [name, *payload_names] if name != INPUT else [*payload_names, name]
        usual = usual if name == options.main else [name]
        inputs[name] = column = given or next((by_lower[n.lower()] for n in usual if n.lower() in by_lower), "")
        if not column:
            say = "COLUMN" if len(options.columns) == 1 else f"{name}=COLUMN"
            raise DataError(
                f"{where}: a table needs a column for the input {name!r}, named {' or '.join(usual[:3])}; "
                f"columns: {listed} (name one with --column {say}, in a config data.column)"
            )
    found = _Columns(
        inputs=inputs,
        id=options.id_column or ("id" if "id" in columns else ""),
        labels=options.label_columns,
        split=options.split_column,
        group=options.group_column,
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
    inputs, paths = {}, ""
    for name, column in wanted.inputs.items():
        is_file = holds_files and name not in options.foreign
        is_binary = is_file and not is_csv and not _is_text(table.column(column).type)
        paths = paths or (column if is_file and not is_binary else "")
        inputs[name] = _bytes(table, column) if is_binary else _text(table, column, pa.large_string(), reasons)
        for row in np.flatnonzero(_is_empty(inputs[name]).to_numpy(zero_copy_only=False)).tolist():
            reasons.setdefault(row, f"empty record (nothing in column {column!r})")
        inputs[name] = pc.fill_null(inputs[name], b"" if is_binary else "")
    ids = pa.array(numbers).cast(pa.string())
    if wanted.id or paths:
        named = _text(table, wanted.id or paths, pa.string(), reasons)
        ids = pc.if_else(_is_empty(named), ids, named)
    extra = {
        name: _text(table, column, pa.string(), reasons)
        for name, column in ((GROUP, wanted.group), (SPLIT, wanted.split))
        if column
    }
    extra |= {LABEL_PREFIX + name: _label(table, name, source, reasons) for name in wanted.labels}
    for row in sorted(reasons):
        options.refuse(Refusal(source.name, int(lines[row]), ids[row].as_py(), reasons[row]))
    return keep_rows(batch_of(ids, inputs, source.name, lines, extra), np.array(sorted(reasons), np.int64))


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
            payloads = {column for name, column in wanted.inputs.items() if holds_files and name not in options.foreign}
            for name in (*wanted.inputs.values(), wanted.id, wanted.split, wanted.group):
                kind = file.schema_arrow.field(name).type if name else pa.string()
                if name in payloads and pa.types.is_struct(kind):
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
