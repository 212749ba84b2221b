"""Parts of payloads, cut out of a column of a record batch without reading what lies beside them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.tokenizer import column_bytes
from meristem.types import Slice

SLICES = pa.struct(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("strand", pa.int8(), nullable=False),
    ]
)
"""Type of a column of payloads that are slices of files: the fields of `Slice`."""


def is_sliced(kind: pa.DataType) -> bool:
    """Whether a column of payloads names slices of files."""
    return pa.types.is_struct(kind)


def values_of(column: pa.Array) -> list[Any]:
    """The values of a column of a record batch; where it names slices of files, these."""
    return [Slice(**values) for values in column.to_pylist()] if is_sliced(column.type) else column.to_pylist()


def slice_sizes(column: pa.Array) -> np.ndarray:
    """`[N]` symbols of each slice of a column."""
    start, stop = (column.field(name).to_numpy() for name in ("start", "stop"))
    return stop - start


def size_at(column: pa.Array, row: int) -> int:
    """Bytes of the payload of a row; symbols of a slice."""
    return len(Slice(**column[row].as_py()) if is_sliced(column.type) else _bytes_of(column, row))


def bytes_at(column: pa.Array, row: int, start: int, stop: int) -> memoryview:
    """A part of the payload of a row, where it lies; of a text, whole characters alone.

    Args:
        column: of strings or bytes.
        start: first byte.
        stop: the byte behind the last.
    """
    data = _bytes_of(column, row).data
    if is_text(column.type):
        while start < stop and data[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        while start < stop < len(data) and data[stop] & 0xC0 == 0x80:
            stop -= 1
    return data[start:stop]


def characters_before(column: pa.Array, row: int, byte: int) -> int:
    """Characters of the text of a row that begin before a byte of it."""
    bounds, data = pa.py_buffer(np.array([0, byte], np.int64)), pa.py_buffer(_bytes_of(column, row)[:byte])
    return int(pc.utf8_length(pa.Array.from_buffers(pa.large_string(), 1, [None, bounds, data]))[0].as_py())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of payloads holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bytes_of(column: pa.Array, row: int) -> np.ndarray:
    """The payload of a row of a string or binary column, where it lies."""
    return column_bytes(column.slice(row, 1))[0]
