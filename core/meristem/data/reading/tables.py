"""Records from tables: CSV, TSV and Parquet with named columns of payloads, as columns and in blocks.

The kind of table is recognised by its content. Line numbers are those of the user's file, also where quoted
values span lines, where lines are blank or where rows are refused.
"""

import csv
import io
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from meristem.data.labels import as_text
from meristem.data.payloads import is_text
from meristem.data.reading.open import BOM, read_text_blocks
from meristem.data.records import GROUP, LABEL_PREFIX, SPLIT, ReadOptions, Refusal, Source, batch_of
from meristem.errors import DataError, DataWarning
from meristem.types import INPUT

PARQUET_MAGIC = b"PAR1"
ID_COLUMNS = ("id", "entry", "accession", "mutant")
"""Names, in any case, of a column that holds the ids where the user names none."""

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
    forms = [TableFormat(mark, tuple(next(csv.reader([text], delimiter=mark), ()))) for mark in DELIMITERS]
    for form in forms:
        if known & {name.lower() for name in form.columns}:
            return form
    best = max(forms, key=lambda form: len(form.columns))
    return best if len(best.columns) > 1 and all(map(_COLUMN_NAME.fullmatch, best.columns)) else None


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
        payload_names: usual names of the first input's column, lower case, the first found is taken.
        holds_files: payloads are files, but for foreign inputs. A column of bytes stays one (also in the field `bytes`
            of a structure); one of text holds paths, which are the ids where no column names them.

    Raises:
        DataError: a column that is not there, a damaged file, or a refused record when there is no `on_error`.
    """
    table = _Table(source, options, payload_names, holds_files, is_csv=bool(form.delimiter))
    yield from _read_csv(stream, table, form) if table.is_csv else _read_parquet(stream, table)


def keep_rows(batch: pa.RecordBatch, refused: np.ndarray) -> pa.RecordBatch:
    """The batch without the rows whose indices are in `refused`."""
    return batch.filter(pa.array(~np.isin(np.arange(batch.num_rows), refused))) if len(refused) else batch


@dataclass(frozen=True)
class _Table:
    """A table that is read; `payload_names` and `holds_files` are those of `read_table`."""

    source: Source
    options: ReadOptions
    payload_names: Sequence[str]
    holds_files: bool
    is_csv: bool

    def find(self, columns: Sequence[str], where: str) -> tuple[dict[str, str], str, list[str]]:
        """The column of each input, that of the ids (empty where there is none), and each column to read, once."""
        options, listed = self.options, ", ".join(columns)
        by_lower = {name.lower(): name for name in reversed(columns)}
        inputs = {}
        for name, given in options.columns.items():
            usual = [name, *self.payload_names] if name != INPUT else [*self.payload_names, name]
            usual = usual if name == options.main else [name]
            inputs[name] = column = given or next((by_lower[n.lower()] for n in usual if n.lower() in by_lower), "")
            if not column:
                say = "COLUMN" if len(options.columns) == 1 else f"{name}=COLUMN"
                raise DataError(
                    f"{where}: a table needs a column for the input {name!r}, named {' or '.join(usual[:3])}; "
                    f"columns: {listed} (name one with --column {say}, in a config data.column)"
                )
        taken = {*inputs.values(), *options.label_columns, options.split_column, options.group_column}
        usual_ids = (by_lower[name] for name in ID_COLUMNS if name in by_lower and by_lower[name] not in taken)
        id = options.id_column or ("id" if "id" in columns else next(usual_ids, ""))
        if id not in ("id", options.id_column):
            warnings.warn(
                f"{where}: ids are those of column {id!r} (--id-column names another)", DataWarning, stacklevel=2
            )
        named = (*inputs.values(), id, *options.label_columns, options.split_column, options.group_column)
        wanted = list(dict.fromkeys(name for name in named if name))
        for name in wanted:
            if columns.count(name) != 1:
                reason = "no column" if name not in columns else "more than one column"
                raise DataError(f"{where}: {reason} {name!r}; columns: {listed}")
        return inputs, id, wanted

    def is_file(self, name: str) -> bool:
        """Whether the payloads of an input are files."""
        return self.holds_files and name not in self.options.foreign

    def batches(
        self, rows: pa.RecordBatch, inputs: Mapping[str, str], id: str, numbers: np.ndarray, lines: np.ndarray
    ) -> Iterator[pa.RecordBatch]:
        """Rows of the table as a record batch without those that have to be refused; none where no row is left."""
        reasons: dict[int, str] = {}
        payloads, paths = {}, ""
        for name, column in inputs.items():
            kind = rows.column(column).type
            is_binary = self.is_file(name) and not (self.is_csv or is_text(kind) or pa.types.is_dictionary(kind))
            paths = paths or (column if self.is_file(name) and not is_binary else "")
            payloads[name] = _bytes(rows, column) if is_binary else _text(rows, column, pa.large_string(), reasons)
            for row in np.flatnonzero(_is_empty(payloads[name]).to_numpy(zero_copy_only=False)).tolist():
                reasons.setdefault(row, f"empty record (nothing in column {column!r})")
            payloads[name] = pc.fill_null(payloads[name], b"" if is_binary else "")
        ids = pa.array(numbers).cast(pa.string())
        if id or paths:
            named = _text(rows, id or paths, pa.string(), reasons)
            ids = pc.if_else(_is_empty(named), ids, named)
        options, file = self.options, self.source.name
        apart = {GROUP: options.group_column, SPLIT: options.split_column}
        extra = {name: _text(rows, column, pa.string(), reasons) for name, column in apart.items() if column}
        extra |= {LABEL_PREFIX + name: _label(rows, name, file, reasons) for name in options.label_columns}
        refused = sorted(reasons)
        for row in refused:
            options.refuse(Refusal(file, int(lines[row]), ids[row].as_py(), reasons[row]))
        batch = keep_rows(batch_of(ids, payloads, file, lines, extra), np.array(refused, np.int64))
        if batch.num_rows:
            yield batch


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


def _label(table: pa.RecordBatch, name: str, file: str, reasons: dict[int, str]) -> pa.Array:
    """A label column as text, whatever the table's types are."""
    column = table.column(name)
    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    try:
        return as_text(_text(table, name, pa.string(), reasons) if is_bytes else column)
    except DataError as error:
        raise DataError(f"{file}: column {name!r}: {error}") from error


def _read_csv(stream: IO[bytes], table: _Table, form: TableFormat) -> Iterator[pa.RecordBatch]:
    inputs, id, wanted = table.find(form.columns, f"{table.source.name}:1")
    for rows, lines, numbers in _csv_blocks(stream, table.source, table.options, form.delimiter, wanted):
        yield from table.batches(rows, inputs, id, numbers - 1, lines)


def _csv_blocks(
    stream: IO[bytes], source: Source, options: ReadOptions, delimiter: str, columns: list[str]
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
    """Blocks of rows as bytes columns, the line each row begins in, and its number (the header's is 1)."""
    block_bytes = max(options.batch_bytes, 1 << 20)
    text = _CountedText(stream, block_bytes)
    bad_rows: list[Any] = []

    def on_bad_row(row: Any) -> str:
        bad_rows.append(row)
        return "error" if options.on_error is None else "skip"

    def report() -> None:
        while bad_rows:
            row = bad_rows.pop(0)
            line = int(text.lines_of(np.array([row.number]))[0])
            reason = f"the row has {row.actual_columns} values and the header {row.expected_columns}"
            options.refuse(Refusal(source.name, line, "", reason))

    skipped: list[int] = []
    number = 2
    try:
        reader = arrow_csv.open_csv(
            text,
            read_options=arrow_csv.ReadOptions(use_threads=False, block_size=block_bytes),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_bad_row
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.large_binary())
            ),
        )
        for table in reader:
            skipped += [row.number for row in bad_rows]
            ahead = np.arange(number, number + table.num_rows + len(skipped))
            numbers = ahead[~np.isin(ahead, skipped)][: table.num_rows]
            report()
            yield table, text.lines_of(numbers), numbers
            if len(numbers):
                number = int(numbers[-1]) + 1
                skipped = [n for n in skipped if n >= number]
                text.forget_before(number)
        report()
    except pa.ArrowInvalid as error:
        report()
        reason = " ".join(str(error).split())
        raise DataError(f"{source.name}: cannot be read as a table of values: {reason}") from error


class _CountedText(io.RawIOBase):
    """A text that keeps the line in which each record of it begins: blank lines and quoted ones do not count."""

    def __init__(self, stream: IO[bytes], block_bytes: int):
        self._blocks = read_text_blocks(stream, block_bytes)
        self._rest = b""
        self._line, self._num_quotes, self._is_at_start = 1, 0, True
        self._first, self._lines = 1, np.zeros(0, np.int64)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._blocks, b"")
            self._count(self._rest)
        size = len(self._rest) if size < 0 else size
        block, self._rest = self._rest[:size], self._rest[size:]
        return block

    def lines_of(self, numbers: np.ndarray) -> np.ndarray:
        """Lines in which the records with these numbers (the header's is 1) begin."""
        at = numbers - self._first
        is_known = (at >= 0) & (at < len(self._lines))
        # stray quotes can hide the ends of records; then their number is the best there is
        return np.where(is_known, self._lines[np.where(is_known, at, 0)] if len(self._lines) else 0, numbers)

    def forget_before(self, number: int) -> None:
        """Let go of the records before `number`."""
        drop = min(number - self._first, len(self._lines))
        self._lines, self._first = self._lines[drop:], self._first + drop

    def _count(self, block: bytes) -> None:
        if not block:
            return
        text = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(text == 10)
        starts, lines = ends + 1, self._line + 1 + np.arange(len(ends))
        if self._num_quotes % 2 or b'"' in block:
            quotes = np.flatnonzero(text == 34)
            is_outside = (np.searchsorted(quotes, ends) + self._num_quotes) % 2 == 0
            starts, lines = starts[is_outside], lines[is_outside]
            self._num_quotes += len(quotes)
        if self._is_at_start:
            starts, lines = np.r_[0, starts], np.r_[self._line, lines]
        self._is_at_start = bool(len(starts)) and bool(starts[-1] == len(text))
        if self._is_at_start:
            starts, lines = starts[:-1], lines[:-1]
        self._lines = np.concatenate([self._lines, lines[text[starts] != 10]])
        self._line += len(ends)


def _read_parquet(stream: IO[bytes], table: _Table) -> Iterator[pa.RecordBatch]:
    name = table.source.name
    with tempfile.TemporaryFile() as copy:
        # Parquet is read from its end: what cannot be wound back is copied first
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.seek(0)
        try:
            file = pq.ParquetFile(copy)
            inputs, id, wanted = table.find(file.schema_arrow.names, name)
            files = {column for one, column in inputs.items() if table.is_file(one)}
            for column in (*inputs.values(), id, table.options.split_column, table.options.group_column):
                kind = file.schema_arrow.field(column).type if column else pa.string()
                if column in files and pa.types.is_struct(kind):
                    if kind.get_field_index(BYTES) < 0:
                        raise DataError(f"{name}: column {column!r} must have a field {BYTES!r}; got {kind}")
                elif pa.types.is_nested(kind):
                    raise DataError(f"{name}: column {column!r} must hold text; got {kind}")
            done = 0
            for rows in file.iter_batches(_rows_ahead(file.metadata), columns=wanted):
                numbers = np.arange(done + 1, done + 1 + rows.num_rows)
                yield from table.batches(rows, inputs, id, numbers, numbers)
                done += rows.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name}: damaged Parquet file: {' '.join(str(error).split())}") from error


def _rows_ahead(facts: pq.FileMetaData) -> int:
    """Rows that are read at once: fewer where they are large."""
    num_bytes = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    return max(1, min(_ROWS_AHEAD, _BYTES_AHEAD * max(facts.num_rows, 1) // max(num_bytes, 1)))
