"""Records in a memory-mapped Arrow file, built once from the user's files and keyed by their content.

Opening one costs nothing, whatever its size; rows are read where they lie. `store_writer` makes the file.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from meristem.data.labels import text_column
from meristem.data.records import LABEL_PREFIX, ReadOptions, Refusal, Source, place_of
from meristem.data.store_writer import END, Progress, Read, write_store
from meristem.data.tokenizer import RefusedSymbol, Tokenizer, column_bytes
from meristem.errors import DataError
from meristem.files import replacing
from meristem.types import Record

Files = Callable[[Source, ReadOptions], Iterable[Path]]
"""Gives the files that a source names beside itself."""

VERSION = 2
"""Changes with the format, so that a store of another one is not opened but built anew."""


def default_cache_dir() -> Path:
    """Where stores are kept: `$MERISTEM_CACHE`, else `~/.cache/meristem`."""
    return Path(os.environ.get("MERISTEM_CACHE") or Path.home() / ".cache" / "meristem")


class RecordStore:
    """Records by number, read where they lie in a file. Travels to other processes as a path.

    Attributes:
        path: the Arrow file.
        refused: records that were refused when the store was built with `on_error` set.
    """

    def __init__(self, path: Path, chunks: list[pa.RecordBatch], end: dict[str, Any]):
        self.path = path
        self.refused = [Refusal(**values) for values in end["refused"]]
        self._files: list[str] = end["files"]
        self._chunks = chunks
        self._schema: pa.Schema = chunks[0].schema
        self._bounds = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])

    @classmethod
    def build(
        cls,
        read: Read,
        sources: Sequence[Source],
        options: ReadOptions,
        *,
        name: str,
        files: Files | None = None,
        cache_dir: Path | str | None = None,
        progress: Progress | None = None,
    ) -> "RecordStore":
        """Open the store of these sources, after building it where there is none.

        Args:
            read: of the domain.
            sources: files; standard input can be read only once and is no source of a store.
            options: of `read`. `on_error` is called with each refused record, also when the store was there.
            name: of the domain, and whatever else changes what `read` gives.
            files: of the domain: files that a source names beside itself, such as those in a folder. They count by
                name, size and time of the last change, since they may be many.
            cache_dir: folder of the stores; None for the default one.
            progress: called with bytes done and bytes in all while a store is built. Bytes done follow
                from the records, so they are an estimate within a file, and exact at its end.

        Raises:
            DataError: a source that cannot be read or holds no record; the folder cannot be written or is full.
        """
        named = {source: sorted(files(source, options)) if files and not source.is_stdin else [] for source in sources}
        key = _key(sources, options, name, named)
        folder = Path(cache_dir) if cache_dir else default_cache_dir()
        path = folder / f"{key}.arrow"
        with _writable(folder), _locked(folder):
            store = _open_or_none(path)
            if store is None:
                for stale in folder.glob(f"{key}.*"):  # what a killed process left, or what is damaged
                    stale.unlink(missing_ok=True)
                sizes = [sum(_sizes([Path(source.path), *named[source]])) for source in sources]
                write_store(path, read, sources, options, progress, sizes)
                store = cls.open(path)
        # the same content may lie elsewhere by now; messages shall name the file that the user named
        before = [Source(file) for file in store._files[: len(sources)]]
        names = {old.name: source.name for old, source in zip(before, sources)}
        names |= {old.within: source.within for old, source in zip(before, sources)}
        store._files = [names.get(file, file) for file in store._files]
        store.refused = [replace(one, file=names.get(one.file, one.file)) for one in store.refused]
        if options.on_error is not None:
            for refusal in store.refused:
                options.on_error(refusal)
        return store

    @classmethod
    def open(cls, path: Path | str) -> "RecordStore":
        """Open a store.

        Raises:
            DataError: no store, one of another version, or one that is cut off.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            count = reader.num_record_batches
            _, metadata = reader.get_batch_with_custom_metadata(count - 1)
            end = json.loads(metadata[END])
            return cls(Path(path), [reader.get_batch(i) for i in range(count - 1)], end)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not a complete record store; delete it, and it is built again") from error

    @classmethod
    def of(cls, records: Sequence[Record]) -> "RecordStore":
        """A store in memory, without a file; it cannot travel to other processes.

        Raises:
            DataError: labels that are neither words, numbers nor lists of these.
        """
        is_bytes = bool(records) and isinstance(records[0].payload, bytes)
        columns: dict[str, Any] = {
            "id": pa.array([record.id for record in records], pa.string()),
            "payload": pa.array(
                [record.payload for record in records], pa.large_binary() if is_bytes else pa.large_string()
            ),
            "file": pa.array(np.arange(len(records)), pa.int32()),
            "line": pa.array(np.zeros(len(records)), pa.int64()),
        }
        for name in sorted({name for record in records for name in record.labels}):
            columns[LABEL_PREFIX + name] = text_column([record.labels.get(name) for record in records])
        end = {"files": [record.source for record in records], "refused": []}
        return cls(Path(), [pa.RecordBatch.from_pydict(columns)], end)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._files)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.records(np.array([row]))[0]

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of the labels, as the user's file has them."""
        names = (name for name in self._schema.names if name.startswith(LABEL_PREFIX))
        return tuple(name.removeprefix(LABEL_PREFIX) for name in names)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Columns of `records.SCHEMA`, then those of labels and split."""
        return tuple(self._schema.names)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column where it lies, by its name in `records.SCHEMA`, or `split`, or a label's name."""
        if name not in self._schema.names:
            name = LABEL_PREFIX + name
        return pa.chunked_array([self._decoded(name, chunk.column(name)) for chunk in self._chunks])

    def payloads(self, rows: np.ndarray) -> pa.Array:
        """Payloads of `rows`, in their order."""
        return self._take("payload", np.asarray(rows))

    def labels(self, name: str, rows: np.ndarray) -> pa.Array:
        """A label of `rows`, in their order; null where it is missing."""
        return self._take(LABEL_PREFIX + name, np.asarray(rows))

    def records(self, rows: np.ndarray) -> list[Record]:
        """`rows` as records; missing labels are left out."""
        rows = np.asarray(rows)
        columns = {name: self._take(name, rows).to_pylist() for name in ("id", "payload", "file", "line")}
        named = {name: self.labels(name, rows).to_pylist() for name in self.label_columns}
        return [
            Record(
                id=columns["id"][i],
                payload=columns["payload"][i],
                labels={name: values[i] for name, values in named.items() if values[i] is not None},
                source=place_of(columns["file"][i], columns["line"][i], columns["id"][i]),
            )
            for i in range(len(rows))
        ]

    def where(self, row: int) -> str:
        """Where a record stands, for messages."""
        return self[row].source

    def token_lengths(
        self, tokenizer: Tokenizer, rows: np.ndarray | None = None, on_error: Callable[[Refusal], None] | None = None
    ) -> np.ndarray:
        """`[N]` tokens of each record, computed once a store and tokenizer and kept beside the store.

        Args:
            rows: that are asked for; None for all.
            on_error: called with each record of `rows` that the tokenizer refuses; it gets -1 tokens.

        Raises:
            DataError: a payload that the tokenizer refuses and no `on_error`; names where it stands.
        """
        lengths = self._lengths_of_all(tokenizer)
        lengths = lengths if rows is None else lengths[rows]
        for place in np.flatnonzero(lengths < 0).tolist():
            row = place if rows is None else int(rows[place])
            record = self[row]
            try:
                tokenizer.lengths(self.payloads(np.array([row])))
            except RefusedSymbol as error:
                if on_error is None:
                    raise DataError(f"{record.source}: {error}") from error
                file, line = (self._take(name, np.array([row]))[0].as_py() for name in ("file", "line"))
                on_error(Refusal(file, line, record.id, str(error)))
        return lengths

    def _lengths_of_all(self, tokenizer: Tokenizer) -> np.ndarray:
        path = self.path.with_suffix(f".{tokenizer.fingerprint}.lengths.npy")
        with suppress(OSError, ValueError):
            lengths = np.load(path, mmap_mode="r")
            if len(lengths) == len(self):
                return lengths
        lengths = np.full(len(self), -1, np.int32)
        for chunk, first in zip(self._chunks, self._bounds.tolist()):
            payloads, done = chunk.column("payload"), 0
            while done < len(payloads):
                count = len(payloads) - done
                try:
                    lengths[first + done : first + done + count] = tokenizer.lengths(payloads.slice(done))
                except RefusedSymbol as error:  # it stays at -1
                    count = error.row
                    lengths[first + done : first + done + count] = tokenizer.lengths(payloads.slice(done, count))
                done += count + 1
        # a full disk costs the next run some seconds
        with suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, lengths)
        return lengths

    def payload_hashes(self, seed: int) -> np.ndarray:
        """`[N]` 64-bit hashes of the payloads, keyed by `seed`: equal payloads, equal numbers.

        Letters of a text hash alike in both cases: a soft-masked sequence is the same sequence.
        """
        key = seed.to_bytes(8, "little")
        out = np.empty(len(self), np.uint64)
        for chunk, start in zip(self._chunks, self._bounds):
            payloads = chunk.column("payload")
            text, bounds = column_bytes(payloads)
            data, ends = text.tobytes(), bounds.tolist()
            is_text = pa.types.is_string(payloads.type) or pa.types.is_large_string(payloads.type)
            spelled = bytes.upper if is_text else bytes
            digests = b"".join(
                hashlib.blake2b(spelled(data[a:b]), digest_size=8, key=key).digest() for a, b in pairwise(ends)
            )
            out[start : start + chunk.num_rows] = np.frombuffer(digests, "<u8")
        return out

    def _take(self, name: str, rows: np.ndarray) -> pa.Array:
        # not ChunkedArray.take, which may join all chunks of a string column first
        of_chunk = np.searchsorted(self._bounds, rows, side="right") - 1
        touched = np.unique(of_chunk)
        if not len(rows):
            return self._decoded(name, self._chunks[0].column(name).slice(0, 0))
        parts, places = [], []
        for i in touched:
            at = np.flatnonzero(of_chunk == i)
            parts.append(self._chunks[i].column(name).take(pa.array(rows[at] - self._bounds[i])))
            places.append(at)
        if len(parts) == 1:
            return self._decoded(name, parts[0])
        back = np.argsort(np.concatenate(places), kind="stable")
        return self._decoded(name, pa.concat_arrays(parts).take(pa.array(back)))

    def _decoded(self, name: str, column: pa.Array) -> pa.Array:
        """File names are stored as numbers, since an Arrow file takes no growing dictionary."""
        if name != "file":
            return column
        return pa.DictionaryArray.from_arrays(column, pa.array(self._files, pa.string()))


def _reopen(path: Path, files: list[str]) -> RecordStore:
    store = RecordStore.open(path)
    store._files = files
    return store


def _open_or_none(path: Path) -> RecordStore | None:
    try:
        return RecordStore.open(path)
    except DataError:
        return None


def _key(sources: Sequence[Source], options: ReadOptions, name: str, named: Mapping[Source, Sequence[Path]]) -> str:
    """A hash of everything that a store depends on."""
    if not sources:
        raise DataError("there must be at least one source of records; got none")
    wanted = {key: value for key, value in asdict(replace(options, on_error=None)).items() if key != "batch_bytes"}
    wanted |= {"version": VERSION, "name": name, "is_refusing": options.on_error is None}
    digest = hashlib.blake2b(json.dumps(wanted, sort_keys=True, default=str).encode(), digest_size=16)
    for source in sources:
        if source.is_stdin:
            raise DataError("<stdin>: training data is read more than once; write it to a file and name that")
        is_folder = os.path.isdir(source.path)
        root = Path(source.path) if is_folder else Path(source.path).parent
        for path in named[source]:
            digest.update(json.dumps([os.path.relpath(path, root), *_facts_of(path)]).encode())
        if is_folder:
            if not named[source]:
                raise DataError(f"{source.name}: is a directory; name the files in it")
            continue
        # a reader may go by the ending of a name, so it counts as content
        digest.update(json.dumps(Path(source.path).suffixes[-2:]).encode())
        try:
            with open(source.path, "rb") as file:
                digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        except FileNotFoundError as error:
            raise DataError(f"{source.name}: no such file") from error
        except OSError as error:
            raise DataError(f"{source.name}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _facts_of(file: Path) -> tuple[int, int]:
    """Size and time of the last change; of a file that is not there, none."""
    try:
        facts = file.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def _sizes(files: Sequence[Path]) -> list[int]:
    """Bytes of each file; of a folder, none."""
    return [max(_facts_of(file)[0], 0) if not file.is_dir() else 0 for file in files]


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Make the folder, and say which it was when the disk is the trouble."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no space is left on its disk; free some"
        else:
            what = f"cannot be written ({error.strerror or error}); make it writable"
        raise DataError(f"{folder}: the cache of record stores: {what}, or set MERISTEM_CACHE") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time: the others wait and find the store built. Without locks on its disk, all build."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
