"""Parts of payloads, cut out of a column of a record batch without reading what lies beside them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.types import Slice

SLICES = pa.struct(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("strand", pa.int8(), nullable=False),
    ]
)
"""Type of a column of payloads that are slices of files."""


def is_sliced(kind: pa.DataType) -> bool:
    """Whether a column of payloads names slices of files."""
    return pa.types.is_struct(kind)


def slice_column(slices: Sequence[Slice]) -> pa.Array:
    """Slices as a column of payloads."""
    names = [field.name for field in SLICES]
    return pa.array([{name: getattr(one, name) for name in names} for one in slices], SLICES)


def slices_of(column: pa.Array) -> list[Slice]:
    """The slices of a column."""
    return [Slice(**values) for values in column.to_pylist()]


def slice_sizes(column: pa.Array) -> np.ndarray:
    """`[N]` symbols of each slice of a column."""
    start, stop = (column.field(name).to_numpy() for name in ("start", "stop"))
    return stop - start


def size_at(column: pa.Array, row: int) -> int:
    """Bytes of the payload of a row; symbols of a slice."""
    if is_sliced(column.type):
        return len(Slice(**column[row].as_py()))
    start, stop = _bounds(column, row)
    return stop - start


def bytes_at(column: pa.Array, row: int, start: int, stop: int) -> memoryview:
    """A part of the payload of a row, where it lies; of a text, whole characters alone.

    Args:
        column: of strings or bytes.
        start: first byte.
        stop: the byte behind the last.
    """
    first, last = _bounds(column, row)
    data = memoryview(column.buffers()[2].slice(first, last - first))
    if is_text(column.type):
        while start < stop and data[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        while start < stop < len(data) and data[stop] & 0xC0 == 0x80:
            stop -= 1
    return data[start:stop]


def characters_before(column: pa.Array, row: int, byte: int) -> int:
    """Characters of the text of a row that begin before a byte of it."""
    first, _ = _bounds(column, row)
    bounds = pa.py_buffer(np.array([0, byte], np.int64))
    text = pa.Array.from_buffers(pa.large_string(), 1, [None, bounds, column.buffers()[2].slice(first, byte)])
    return int(pc.utf8_length(text)[0].as_py())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of payloads holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bounds(column: pa.Array, row: int) -> tuple[int, int]:
    """Where a payload of a string or binary column begins and ends in its buffer."""
    is_large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    offsets = np.frombuffer(column.buffers()[1], np.int64 if is_large else np.int32)
    at = column.offset + row
    return int(offsets[at]), int(offsets[at + 1])
