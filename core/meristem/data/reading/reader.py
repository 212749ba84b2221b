"""The contract of a reader: how a domain turns files into records."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from meristem.data.records import ReadOptions, Source
from meristem.errors import DataError
from meristem.types import Slice

Row = TypeVar("Row")


def gather(rows: Iterable[Row], size_of: Callable[[Row], int], batch_bytes: int) -> Iterator[list[Row]]:
    """Consecutive rows in lists, each closed when the sizes of its rows add up to `batch_bytes` or more."""
    held: list[Row] = []
    num_bytes = 0
    for row in rows:
        held.append(row)
        num_bytes += size_of(row)
        if num_bytes >= batch_bytes:
            yield held
            held, num_bytes = [], 0
    if held:
        yield held


class Reader(ABC):
    """Reads the files of a domain. A plain value: it travels to the processes that prepare packs."""

    @abstractmethod
    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        """Read a source as record batches: the columns of `records.SCHEMA`, inputs, then group, split and labels.

        Each batch holds about `options.batch_bytes` of payloads, so that memory does not grow with the file. What
        cannot be used is refused by file and line through `options.refuse`.

        Raises:
            DataError: the source cannot be read, or a record is refused and `options.on_error` is None.
        """

    def files(self, source: Source, options: ReadOptions) -> list[Path]:
        """The files that a source names beside itself, such as those in a folder.

        A change in one of them is a change of the source. None by default: a source is one file.
        """
        return []

    def canonical(self, payload: str | bytes) -> bytes:
        """The bytes that payloads have in common which are the same thing, such as a sequence in either case.

        Splits and the count of repeated records go by these bytes. By default a payload is the same as its copies only.
        """
        return payload.encode() if isinstance(payload, str) else payload

    def fetch(self, slices: Sequence[Slice]) -> pa.Array:
        """The payloads that slices of files name, many at once.

        Raises:
            DataError: the domain has no slices; it reads whole payloads.
        """
        raise DataError(f"{type(self).__name__} reads whole payloads and cannot fetch slices of files")
