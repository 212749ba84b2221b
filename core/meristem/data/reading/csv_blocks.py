"""The rows of a CSV file in blocks of byte columns, each with the line of the user's file that it begins in."""

import io
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from meristem.data.reading.open import read_text_blocks
from meristem.data.records import ReadOptions, Refusal, Source
from meristem.errors import DataError


def csv_blocks(
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
