"""Records in a memory-mapped Arrow file, built once from the user's files and keyed by their content.

Opening one costs nothing, whatever its size; rows are read where they lie. `store_writer` makes the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meristem.data.labels import text_column
from meristem.data.payloads import bytes_at, characters_before, is_sliced, is_text, size_at, slice_sizes, values_of
from meristem.data.reading.reader import Reader
from meristem.data.records import (
    GROUP,
    INPUT_PREFIX,
    LABEL_PREFIX,
    ReadOptions,
    Refusal,
    Source,
    batch_of,
    names_of,
    records_of,
)
from meristem.data.store_writer import END, Progress, default_cache_dir, locked, store_key, write_store
from meristem.data.tokenizer import RefusedSymbol, Tokenizer
from meristem.errors import ConfigError, DataError
from meristem.files import replacing
from meristem.types import INPUT, Record, Slice


class RecordStore:
    """Records by number, read where they lie in a file. Travels to other processes as a path.

    Attributes:
        refused: records that were refused when the store was built with `on_error` set.
    """

    def __init__(self, path: Path, chunks: list[pa.RecordBatch], end: dict[str, Any], reader: Reader):
        self.path, self.reader = path, reader
        self.refused = [Refusal(**values) for values in end["refused"]]
        self._files: list[str] = end["files"]
        self._source_ends = np.cumsum(end["counts"])
        self._is_ascii: dict[str, np.ndarray] = {}  # by input, of each record, once it is asked for
        self._chunks = chunks
        self._schema: pa.Schema = chunks[0].schema
        self._bounds = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])

    @classmethod
    def build(
        cls,
        reader: Reader,
        sources: Sequence[Source],
        options: ReadOptions,
        *,
        name: str,
        cache_dir: Path | str | None = None,
        progress: Progress | None = None,
    ) -> "RecordStore":
        """Open the store of these sources, after building it where there is none.

        Args:
            sources: files; standard input can be read only once and is no source of a store.
            options: how to read. `on_error` is called with each refused record, also when the store was there.
            name: of the domain, and whatever else changes what the reader gives.
            progress: called with bytes done and bytes in all while a store is built. Bytes done follow
                from the records, so they are an estimate within a file, and exact at its end.

        Raises:
            DataError: a source that cannot be read or holds no record; the folder cannot be written or is full.
        """
        named = {source: [] if source.is_stdin else sorted(reader.files(source, options)) for source in sources}
        key = store_key(sources, options, name, named)
        folder = Path(cache_dir) if cache_dir else default_cache_dir()
        path = folder / f"{key}.arrow"
        with locked(folder):
            try:
                store = cls.open(path, reader)
            except DataError:
                for stale in folder.glob(f"{key}.*"):  # what a killed process left, or what is damaged
                    stale.unlink(missing_ok=True)
                files = ([Path(source.path), *named[source]] for source in sources)
                sizes = [sum(file.stat().st_size for file in each if file.is_file()) for each in files]
                write_store(path, reader, sources, options, progress, sizes)
                store = cls.open(path, reader)
        # the same content may lie elsewhere by now; messages shall name the file that the user named
        pairs = [(Source(file), source) for file, source in zip(store._files, sources)]
        names = {old.name: new.name for old, new in pairs} | {old.within: new.within for old, new in pairs}
        store._files = [names.get(file, file) for file in store._files]
        store.refused = [replace(one, file=names.get(one.file, one.file)) for one in store.refused]
        for refusal in store.refused if options.on_error is not None else ():
            options.refuse(refusal)
        return store

    @classmethod
    def open(cls, path: Path | str, reader: Reader) -> "RecordStore":
        """Open a store that was built with this reader.

        Raises:
            DataError: no store, one of another version, or one that is cut off.
        """
        try:
            file = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            count = file.num_record_batches
            _, metadata = file.get_batch_with_custom_metadata(count - 1)
            end = json.loads(metadata[END])
            return cls(Path(path), [file.get_batch(i) for i in range(count - 1)], end, reader)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not a complete record store; delete it, and it is built again") from error

    @classmethod
    def of(cls, records: Sequence[Record], reader: Reader | None = None) -> "RecordStore":
        """A store in memory, without a file; it cannot travel to other processes.

        Raises:
            DataError: labels that are neither words, numbers nor lists of these.
        """
        inputs = {}
        for name, first in records[0].inputs.items():
            kind = pa.large_binary() if isinstance(first, bytes) else pa.large_string()
            inputs[name] = pa.array([record.inputs[name] for record in records], kind)
        extra = {GROUP: pa.array([record.group or None for record in records], pa.string())}
        for name in sorted({name for record in records for name in record.labels}):
            extra[LABEL_PREFIX + name] = text_column([record.labels.get(name) for record in records])
        ids = pa.array([record.id for record in records], pa.string())
        batch = batch_of(ids, inputs, "", np.zeros(len(records), np.int64), extra)
        batch = batch.set_column(1, "file", pa.array(np.arange(len(records)), pa.int32()))
        end = {"files": [record.source for record in records], "counts": [len(records)], "refused": []}
        return cls(Path(), [batch], end, reader or _Memory())

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordStore.open, (self.path, self.reader), {"_files": self._files}

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.records(np.array([row]))[0]

    @property
    def inputs(self) -> tuple[str, ...]:
        return names_of(self._schema, INPUT_PREFIX)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of the labels, as the user's file has them."""
        return names_of(self._schema, LABEL_PREFIX)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Columns of a record batch (`records`)."""
        return tuple(self._schema.names)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column where it lies, by its name in a record batch, or a label's name."""
        if name not in self._schema.names:
            name = LABEL_PREFIX + name
        return pa.chunked_array([self._decoded(name, chunk.column(name)) for chunk in self._chunks])

    def payloads(self, rows: np.ndarray, name: str = INPUT) -> pa.Array:
        """Payloads of an input of `rows`, in their order; slices of files are read."""
        return self.fetched(self._take(INPUT_PREFIX + name, np.asarray(rows)))

    def fetched(self, column: pa.Array) -> pa.Array:
        """A column of payloads; where it names slices of files, their content."""
        return self.reader.fetch(values_of(column)) if is_sliced(column.type) else column

    def sizes(self, rows: np.ndarray, name: str = INPUT) -> np.ndarray:
        """`[N]` bytes of an input of `rows`; symbols of slices. No payload is read."""
        columns = [chunk.column(INPUT_PREFIX + name) for chunk in self._chunks]
        return np.array([size_at(columns[i], row) for i, row in zip(*self._places(np.asarray(rows)))], np.int64)

    def stretches(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, name: str = INPUT) -> pa.Array:
        """Parts of an input of `rows` between two bytes (symbols, of a slice) of each; no other bytes are read."""
        kind = self._schema.field(INPUT_PREFIX + name).type
        parts = list(zip(starts.tolist(), stops.tolist()))
        if is_sliced(kind):
            slices = values_of(self._take(INPUT_PREFIX + name, np.asarray(rows)))
            return self.reader.fetch([one.part(start, stop) for one, (start, stop) in zip(slices, parts)])
        columns = [chunk.column(INPUT_PREFIX + name) for chunk in self._chunks]
        cut = [bytes_at(columns[i], row, *part) for i, row, part in zip(*self._places(np.asarray(rows)), parts)]
        return pa.array(cut, pa.large_binary()).view(kind)

    def is_text(self, name: str = INPUT) -> bool:
        """Whether an input is a text, of which a character may be several bytes."""
        return is_text(self._schema.field(INPUT_PREFIX + name).type)

    def characters(self, row: int, byte: int, name: str = INPUT) -> int:
        """Characters of a text that begin before a byte of it: at once where all are ASCII, else they are counted."""
        [chunk], [place] = self._places(np.array([row]))
        column = self._chunks[chunk].column(INPUT_PREFIX + name)
        if name not in self._is_ascii:
            parts = [part.column(INPUT_PREFIX + name) for part in self._chunks]
            same = [pc.equal(pc.utf8_length(part), pc.binary_length(part)) for part in parts]
            self._is_ascii[name] = np.concatenate([part.to_numpy(zero_copy_only=False) for part in same])
        return byte if self._is_ascii[name][row] else characters_before(column, place, byte)

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """`[N]` number of the source that each of `rows` was read from, in the order in which sources were given."""
        return np.searchsorted(self._source_ends, rows, side="right")

    def labels(self, name: str, rows: np.ndarray) -> pa.Array:
        """A label of `rows`, in their order; null where it is missing."""
        return self._take(LABEL_PREFIX + name, np.asarray(rows))

    def records(self, rows: np.ndarray, is_whole: np.ndarray | None = None) -> list[Record]:
        """`rows` as records; missing labels are left out.

        Args:
            is_whole: `[N]` whose first input is read; that of others is a `Slice` of the store. None for all.
        """
        rows, main = np.asarray(rows), INPUT_PREFIX + self.inputs[0]
        whole = rows if is_whole is None else rows[is_whole]
        columns = {name: values_of(self._take(name, whole if name == main else rows)) for name in self._schema.names}
        if is_whole is not None and len(whole) < len(rows):
            left, sizes = iter(columns[main]), self.sizes(rows, self.inputs[0]).tolist()
            columns[main] = [
                next(left) if is_read else Slice(os.fspath(self.path), 0, size)
                for is_read, size in zip(is_whole.tolist(), sizes)
            ]
        return records_of(columns)

    def where(self, row: int) -> str:
        """Where a record stands, for messages: `file:line`."""
        return self.refusal(row, "").where

    def refusal(self, row: int, reason: str) -> Refusal:
        """A record that cannot be used for this reason."""
        file, line, id = (self._take(name, np.array([row]))[0].as_py() for name in ("file", "line", "id"))
        return Refusal(file, line, id, reason)

    def token_lengths(
        self,
        tokenizer: Tokenizer,
        rows: np.ndarray | None = None,
        on_error: Callable[[Refusal], None] | None = None,
        name: str = INPUT,
    ) -> np.ndarray:
        """`[N]` tokens of an input of `rows`, computed once a store and tokenizer and kept beside the store.

        Args:
            rows: None for all.
            on_error: called with each record of `rows` that the tokenizer refuses; it gets -1 tokens.

        Raises:
            DataError: a payload that the tokenizer refuses and no `on_error`; names where it stands.
        """
        lengths = self._lengths_of_all(tokenizer, name)
        lengths = lengths if rows is None else lengths[rows]
        for place in np.flatnonzero(lengths < 0).tolist():
            row = place if rows is None else int(rows[place])
            try:
                tokenizer.lengths(self.payloads(np.array([row]), name))
            except RefusedSymbol as error:
                if on_error is None:
                    raise DataError(f"{self.where(row)}: {error}") from error
                on_error(self.refusal(row, str(error)))
        return lengths

    def _lengths_of_all(self, tokenizer: Tokenizer, name: str) -> np.ndarray:
        path = self.path.with_suffix(f".{name}.{tokenizer.fingerprint}.lengths.npy")
        with suppress(OSError, ValueError):
            lengths = np.load(path, mmap_mode="r")
            if len(lengths) == len(self):
                return lengths
        lengths = np.full(len(self), -1, np.int32)
        for chunk, own in zip(self._chunks, np.split(lengths, self._bounds[1:-1])):
            payloads, done = chunk.column(INPUT_PREFIX + name), 0
            if is_sliced(payloads.type):  # of slices nothing is read
                if tokenizer.symbols_per_token is None:
                    raise ConfigError(
                        f"slices of files need a tokenizer that can encode parts; {tokenizer.kind} cannot"
                    )
                own[:] = tokenizer.length_of(slice_sizes(payloads))
                continue
            while done < len(payloads):
                stop = len(payloads)
                try:
                    own[done:] = tokenizer.lengths(payloads.slice(done))
                except RefusedSymbol as error:  # it stays at -1
                    stop = done + error.row
                    own[done:stop] = tokenizer.lengths(payloads.slice(done, error.row))
                done = stop + 1
        # a full disk costs the next run some seconds
        with suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, lengths)
        return lengths

    def canonical(self) -> Iterator[list[bytes]]:
        """What the payloads of each record come down to (`Reader.canonical`), joined by a zero byte, by chunks."""
        for chunk in self._chunks:
            columns = [self.fetched(chunk.column(INPUT_PREFIX + name)).to_pylist() for name in self.inputs]
            yield [b"\0".join(map(self.reader.canonical, payloads)) for payloads in zip(*columns)]

    def payload_hashes(self, seed: int) -> np.ndarray:
        """`[N]` 64-bit hashes of the canonical payloads, keyed by `seed`: the same payloads, the same numbers."""
        return np.concatenate([_hashes(payloads, seed) for payloads in self.canonical()])

    def group_hashes(self, seed: int) -> np.ndarray:
        """`[N]` 64-bit hashes, keyed by `seed`, of what must stay together: a record's group, or else its payload."""
        hashes = self.payload_hashes(seed)
        grouped = {row: group.encode() for row, group in enumerate(self.groups()) if group is not None}
        hashes[list(grouped)] = _hashes([*grouped.values()], seed)
        return hashes

    def groups(self) -> list[str | None]:
        """Group of each record; None where it has none."""
        return self.column(GROUP).to_pylist() if GROUP in self._schema.names else [None] * len(self)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunk of each row, and its row there."""
        of_chunk = np.searchsorted(self._bounds, rows, side="right") - 1
        return of_chunk, rows - self._bounds[of_chunk]

    def _take(self, name: str, rows: np.ndarray) -> pa.Array:
        # not ChunkedArray.take, which may join all chunks of a string column first
        of_chunk, places = self._places(rows)
        touched = np.unique(of_chunk) if len(rows) else [0]
        parts = [self._chunks[i].column(name).take(pa.array(places[of_chunk == i])) for i in touched]
        if len(parts) > 1:
            back = np.argsort(np.argsort(of_chunk, kind="stable"))
            parts = [pa.concat_arrays(parts).take(pa.array(back))]
        return self._decoded(name, parts[0])

    def _decoded(self, name: str, column: pa.Array) -> pa.Array:
        """File names are stored as numbers, since an Arrow file takes no growing dictionary."""
        if name != "file":
            return column
        return pa.DictionaryArray.from_arrays(column, pa.array(self._files, pa.string()))


class _Memory(Reader):
    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        raise DataError(f"{source.name}: records in memory are read from no file")


def _hashes(values: Sequence[bytes], seed: int) -> np.ndarray:
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(value, digest_size=8, key=key).digest() for value in values)
    return np.frombuffer(digests, "<u8").copy()
