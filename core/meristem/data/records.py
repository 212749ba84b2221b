"""Records as columns: what a domain's reader takes and yields.

Large inputs move as Arrow record batches; a `Record` is a row of one. Its columns are those of `SCHEMA`, one column
`input:<name>` for each input, then `group` and `split` where they were asked for, and `label:<name>` for each label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from meristem.data.labels import as_text
from meristem.data.payloads import values_of
from meristem.errors import ConfigError, DataError, require
from meristem.types import INPUT, Record

INPUT_PREFIX = "input:"
"""The payloads of an input `source` are the column `input:source` of a record batch."""

PAYLOAD = INPUT_PREFIX + INPUT
"""The column of payloads where records have one input."""

LABEL_PREFIX = "label:"
"""A label column `score` of the user's file is the column `label:score` of a record batch."""

SPLIT = "split"
"""The column of a record batch that names the part a record belongs to, where a split column was asked for."""

GROUP = "group"
"""The column of a record batch that names what must stay in one part of a split, where a group column was asked for."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        # where it ends in "/", it holds a file for each record, under its id
        pa.field("file", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("line", pa.int64(), nullable=False),  # from 1; the row of a Parquet file; 0 for none
    ]
)
"""The columns that every record batch begins with. Columns of inputs (`large_string` or `large_binary`) follow."""


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
        return place_of(self.file, self.line, self.id)


@dataclass(frozen=True)
class ReadOptions:
    """How to read a source; the same for every domain.

    Attributes:
        columns: the inputs that each record has, and the column of a table (CSV, TSV, Parquet) that holds each; empty
            for a column of the input's own name, or for the first input the domain's usual name.
        foreign: inputs that another domain's tokenizer reads; they are taken as they stand in the file.
        id_column: column of a table that holds the id; empty for a usual name (`ID_COLUMNS`), else the row number.
        label_columns: columns of a table to carry along as labels.
        split_column: column of a table that names the part a record belongs to (train, validation, test).
        group_column: column of a table that names what must stay in one part of a split.
        on_error: called with each refused record when set; when None a refusal is a `DataError`.
        batch_bytes: payload bytes that a record batch holds, about.
        is_checking: payloads are looked at as closely as the tokenizer will, so that none is refused later on; False
            where all are encoded next, in any case.
    """

    columns: Mapping[str, str] = field(default_factory=lambda: {INPUT: ""})
    foreign: tuple[str, ...] = ()
    id_column: str = ""
    label_columns: tuple[str, ...] = ()
    split_column: str = ""
    group_column: str = ""
    on_error: Callable[[Refusal], None] | None = field(default=None, compare=False)
    batch_bytes: int = 4 << 20
    is_checking: bool = True

    @property
    def main(self) -> str:
        """Name of the first input: the only one of most domains."""
        return next(iter(self.columns))

    @property
    def named_columns(self) -> tuple[str, ...]:
        """Columns of a table that the user named."""
        extra = (*self.label_columns, self.split_column, self.group_column, self.id_column)
        return tuple(name for name in (*self.columns.values(), *extra) if name)

    def require_bare(self, where: str, reason: str) -> None:
        """Raise a `DataError` where labels, splits, groups or a second input are wanted of a file without columns."""
        for name in (*self.label_columns, self.split_column, self.group_column):
            if name:
                raise DataError(f"{where}: no column {name!r}: {reason}")
        if len(self.columns) > 1:
            raise DataError(f"{where}: no column for the input {list(self.columns)[1]!r}: {reason}")

    def refuse(self, refusal: Refusal) -> None:
        """Report a refused record to `on_error`, or raise it as a `DataError` where there is none."""
        if self.on_error is None:
            raise DataError(str(refusal))
        self.on_error(refusal)


def labels_of(batch: pa.RecordBatch, column: str) -> pa.Array:
    """A label column of a record batch as text; a `DataError` names the file and the column that has no labels."""
    try:
        return as_text(batch.column(column))
    except DataError as error:
        file = batch.column("file")[0].as_py()
        raise DataError(f"{file}: column {column.removeprefix(LABEL_PREFIX)!r}: {error}") from error


def columns_of(said: str | Mapping[str, str] | Sequence[str], inputs: Sequence[str] = (INPUT,)) -> dict[str, str]:
    """The column of a table that each input is in, as `ReadOptions.columns` has it.

    Args:
        said: by a user: a column, a mapping of inputs to columns, or words `COLUMN` and `INPUT=COLUMN`. An input that
            is not named has the empty column.
        inputs: names of the inputs there are.

    Raises:
        ConfigError: an unknown input, an input twice, or a column of no input where there are several.
    """
    pairs = list(said.items()) if isinstance(said, Mapping) else []
    words = [said] if isinstance(said, str) else () if pairs else said
    for word in filter(None, words):
        name, is_pair, column = word.partition("=")
        if is_pair and name in inputs:
            pairs.append((name, column))
        elif len(inputs) == 1:
            pairs.append((inputs[0], word))
        else:
            raise ConfigError(
                f"column must say which input it is of, one of {', '.join(inputs)} (as in --column {inputs[0]}=COLUMN; "
                f"in a config data.column: {{{inputs[0]}: COLUMN}}); got {word!r}"
            )
    columns = dict.fromkeys(inputs, "")
    for name, column in pairs:
        require(name in columns, f"column must be of an input, one of {', '.join(inputs)}", repr(name))
        said_twice = f"{columns[name]!r} and {column!r}"
        require(not columns[name], f"column of the input {name!r} must be said once", said_twice)
        columns[name] = column
    return columns


def place_of(file: str, line: int, id: str) -> str:
    """Where a record stands, as messages say it: `file:line`, or the name of its own file."""
    if line:
        return f"{file}:{line}"
    return f"{file}{id}" if file.endswith("/") else file


def batch_of(
    ids: pa.Array,
    inputs: pa.Array | Mapping[str, pa.Array],
    file: str,
    lines: np.ndarray | Sequence[int],
    extra: Mapping[str, pa.Array] | None = None,
) -> pa.RecordBatch:
    """A record batch of one file.

    Args:
        inputs: payloads by the name of the input, or those of the one input.
        file: column `file`.
        lines: `[N]` line of each record.
        extra: columns that follow: `group`, `split` and labels, by their names in a batch.
    """
    named = inputs if isinstance(inputs, Mapping) else {INPUT: inputs}
    files = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(ids), np.int32)), pa.array([file]))
    columns = [ids.cast(pa.string()), files, pa.array(lines, pa.int64()), *named.values(), *(extra or {}).values()]
    fields = [pa.field(INPUT_PREFIX + name, column.type, nullable=False) for name, column in named.items()]
    fields += [pa.field(name, column.type) for name, column in (extra or {}).items()]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema([*SCHEMA, *fields]))


def names_of(schema: pa.Schema, prefix: str) -> tuple[str, ...]:
    """Names of the inputs (`INPUT_PREFIX`) or labels (`LABEL_PREFIX`) of a record batch, in their order."""
    return tuple(name.removeprefix(prefix) for name in schema.names if name.startswith(prefix))


def record_at(batch: pa.RecordBatch, row: int) -> Record:
    """Row `row` of a record batch as a `Record`."""
    one = batch.slice(row, 1)
    columns = {name: one.column(name) for name in one.schema.names}
    columns |= {name: labels_of(one, name) for name in columns if name.startswith(LABEL_PREFIX)}
    return records_of({name: values_of(column) for name, column in columns.items()})[0]


def records_of(columns: Mapping[str, list[Any]]) -> list[Record]:
    """Columns of a record batch, as Python lists by name, as records; missing labels are left out."""
    inputs, labels = (
        {name.removeprefix(prefix): values for name, values in columns.items() if name.startswith(prefix)}
        for prefix in (INPUT_PREFIX, LABEL_PREFIX)
    )
    groups = columns.get(GROUP) or [None] * len(columns["id"])
    return [
        Record(
            id=id,
            inputs={name: values[i] for name, values in inputs.items()},
            labels={name: values[i] for name, values in labels.items() if values[i] is not None},
            source=place_of(file, line, id),
            group=groups[i] or "",
        )
        for i, (id, file, line) in enumerate(zip(columns["id"], columns["file"], columns["line"]))
    ]
