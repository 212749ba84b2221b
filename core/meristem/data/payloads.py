"""Columns of payloads: their bytes where they lie, texts, and slices of files that are read later."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.errors import DataError
from meristem.types import Slice

_SLICE_TYPES = {"file": pa.string(), "start": pa.int64(), "stop": pa.int64(), "strand": pa.int8()}
SLICES = pa.struct([pa.field(name, kind, nullable=False) for name, kind in _SLICE_TYPES.items()])
"""Type of a column of payloads that are slices of files: the fields of `Slice`."""

_OFFSET_TYPES = {pa.string(): np.int32, pa.binary(): np.int32, pa.large_string(): np.int64, pa.large_binary(): np.int64}


class RefusedSymbol(DataError):
    """A symbol that the tokenizer does not take.

    Attributes:
        row: row of the column it stands in (0 for a single payload).
        offset: byte of the payload.
        symbol: what was found; empty where the whole payload is refused.
        reason: why it is refused.
    """

    def __init__(self, row: int, offset: int, symbol: str, reason: str):
        super().__init__(f"{reason} at position {offset + 1}" if symbol else reason)
        self.row, self.offset, self.symbol, self.reason = row, offset, symbol, reason


def column_bytes(payloads: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a string or binary column and the `[N + 1]` bounds of its rows, without a copy.

    Raises:
        DataError: not a column of strings or bytes, or one with missing values.
    """
    if isinstance(payloads, pa.ChunkedArray):
        payloads = payloads.combine_chunks()
    width = _OFFSET_TYPES.get(payloads.type)
    if width is None or payloads.null_count:
        got = payloads.type if width is None else f"{payloads.null_count} missing values"
        raise DataError(f"payloads must be an Arrow column of strings or bytes; got {got}")
    _, offsets, data = payloads.buffers()
    bounds = np.frombuffer(offsets, dtype=width)[payloads.offset : payloads.offset + len(payloads) + 1]
    bounds = bounds.astype(np.int64) if len(bounds) else np.zeros(1, np.int64)
    text = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    return text[bounds[0] : bounds[-1]], bounds - bounds[0]


def is_sliced(kind: pa.DataType) -> bool:
    """Whether the payloads of a column are slices of files (`Slice`), which are read when they are needed."""
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
    """Bytes `start` to `stop` of the payload of a row, where they lie; of a text, whole characters alone."""
    data = _bytes_of(column, row).data
    if is_text(column.type):
        while start < stop and data[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        while start < stop < len(data) and data[stop] & 0xC0 == 0x80:
            stop -= 1
    return data[start:stop]


def characters_before(column: pa.Array, row: int, byte: int) -> int:
    """Number of characters that begin before byte `byte` of the UTF-8 text in a row."""
    bounds, data = pa.py_buffer(np.array([0, byte], np.int64)), pa.py_buffer(_bytes_of(column, row)[:byte])
    return int(pc.utf8_length(pa.Array.from_buffers(pa.large_string(), 1, [None, bounds, data]))[0].as_py())


def is_text(kind: pa.DataType) -> bool:
    """Whether the payloads of a column are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bytes_of(column: pa.Array, row: int) -> np.ndarray:
    """The payload of a row of a string or binary column, where it lies."""
    return column_bytes(column.slice(row, 1))[0]
