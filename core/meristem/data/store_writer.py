"""Building a record store: the key that it is found by, and its file.

The file is an Arrow IPC file: chunks of record batches (`records`), then an empty chunk that marks the end
and carries, as JSON, what is known only there (names of files, records of each source, refused records). File names
are numbers in it, since an Arrow file takes no dictionary that grows.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from meristem.data.reading.reader import Reader, gather
from meristem.data.records import LABEL_PREFIX, ReadOptions, Refusal, Source, labels_of
from meristem.errors import DataError
from meristem.files import replacing

VERSION = 4
"""Changes with the format, so that a store of another one is not opened but built anew."""

CHUNK_BYTES = 32 << 20
"""Payload bytes of a chunk: few chunks to look a row up in, and little memory to build one."""

END = b"meristem.end"
"""Key of what the last chunk carries."""

Progress = Callable[[int, int], None]


def default_cache_dir() -> Path:
    """Where stores are kept: `$MERISTEM_CACHE`, else `~/.cache/meristem`."""
    return Path(os.environ.get("MERISTEM_CACHE") or Path.home() / ".cache" / "meristem")


def store_key(
    sources: Sequence[Source], options: ReadOptions, name: str, named: Mapping[Source, Sequence[Path]]
) -> str:
    """A hash of everything that a store depends on."""
    if not sources:
        raise DataError("there must be at least one source of records; got none")
    wanted = {key: value for key, value in asdict(replace(options, on_error=None)).items() if key != "batch_bytes"}
    wanted |= {"version": VERSION, "name": name, "is_refusing": options.on_error is None}
    wanted["columns"] = list(options.columns.items())  # their order counts
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
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise DataError(f"{source.name}: {what}") from error
    return digest.hexdigest()


def _facts_of(file: Path) -> tuple[int, int]:
    """Size and time of the last change; of a file that is not there, none."""
    try:
        facts = file.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and let one builder in at a time: the others wait and find the store built.

    Without locks on its disk, all build. Errors of the disk name the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error}); make it writable"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no space is left on its disk; free some"
        raise DataError(f"{folder}: the cache of record stores: {what}, or set MERISTEM_CACHE") from error


class _Wider(Exception):
    """A later batch needs columns of a wider type than the file was begun with."""

    def __init__(self, schema: pa.Schema):
        self.schema = schema


def write_store(
    path: Path,
    reader: Reader,
    sources: Sequence[Source],
    options: ReadOptions,
    progress: Progress | None,
    sizes: Sequence[int],
    schema: pa.Schema | None = None,
) -> None:
    """Read the sources and write their store.

    Args:
        sizes: bytes of each source, with the files that it names.
        schema: of the file; None for that of the first batch.
    """
    refused: list[Refusal] = []
    read = options if options.on_error is None else replace(options, on_error=refused.append)
    codes = {source.name: i for i, source in enumerate(sources)}
    counts = [0] * len(sources)

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal schema
        for number, source in enumerate(sources):
            before, done = sum(sizes[:number]), 0
            for batch in reader.read(source, read):
                counts[number] += batch.num_rows
                if batch.num_rows:
                    plain = _plain(batch, codes)
                    schema = schema or plain.schema
                    yield plain if plain.schema == schema else _cast(plain, schema, batch)
                done += batch.nbytes
                if progress is not None:
                    progress(before + min(done, sizes[number]), sum(sizes))
            if progress is not None:
                progress(before + sizes[number], sum(sizes))

    writer: pa.ipc.RecordBatchFileWriter | None = None
    try:
        with replacing(path) as temporary, pa.OSFile(os.fspath(temporary), "wb") as sink:
            for held in gather(batches(), lambda batch: batch.nbytes, CHUNK_BYTES):
                writer = writer or pa.ipc.new_file(sink, schema)
                writer.write_batch(pa.Table.from_batches(held).combine_chunks().to_batches()[0])
            if writer is None:
                what = f"; {len(refused)} were refused, the first: {refused[0]}" if refused else ""
                raise DataError(f"{', '.join(source.name for source in sources)}: no records{what}")
            end = {"files": list(codes), "counts": counts, "refused": [asdict(one) for one in refused]}
            nothing = pa.RecordBatch.from_pylist([], schema=schema)
            writer.write_batch(nothing, custom_metadata={END: json.dumps(end).encode()})
            writer.close()
    except _Wider as wider:  # rare: begin again; types only widen, so this ends
        write_store(path, reader, sources, options, progress, sizes, wider.schema)


def _plain(batch: pa.RecordBatch, codes: dict[str, int]) -> pa.RecordBatch:
    """The batch without dictionaries: file names as numbers, labels as text."""
    columns, fields = [], []
    for field, column in zip(batch.schema, batch.columns):
        if field.name == "file":
            names = column.dictionary.to_pylist()
            table = pa.array([codes.setdefault(name, len(codes)) for name in names], pa.int32())
            column = table.take(column.indices)
        elif field.name.startswith(LABEL_PREFIX):
            column = labels_of(batch, field.name)
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        columns.append(column)
        fields.append(pa.field(field.name, column.type, field.nullable))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _cast(plain: pa.RecordBatch, schema: pa.Schema, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the types of `schema`, or `_Wider` where the schema's are too narrow."""
    name = batch.column("file")[0].as_py()
    if plain.schema.names != schema.names:
        raise DataError(
            f"{name}: all sources must have the same columns; "
            f"got {', '.join(plain.schema.names)}, and before {', '.join(schema.names)}"
        )
    try:
        wider = pa.unify_schemas([schema, plain.schema], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise DataError(f"{name}: a column has another type than in the records before: {error}") from error
    if wider != schema:
        raise _Wider(wider)
    return plain.cast(schema)
