"""Reading pictures: folders, tables of paths or bytes, tar files, and single files.

A payload is the content of a picture's file; the tokenizer decodes it. The kind of a source is recognised by its
content. A picture that cannot be decoded is refused by the name of its file.
"""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from meristem.data.labels import text_column
from meristem.data.reading.open import BLOCK_BYTES, open_source
from meristem.data.reading.reader import Reader, gather
from meristem.data.reading.tables import TableFormat, read_table, table_format
from meristem.data.records import GROUP, INPUT_PREFIX, LABEL_PREFIX, SPLIT, ReadOptions, Refusal, Source, batch_of
from meristem.errors import DataError
from meristem_domains.vision.folders import LABEL, Found, class_and_part, find_pictures
from meristem_domains.vision.pictures import SUFFIXES, NoPicture, check_picture, looks_like_picture
from meristem_domains.vision.shards import is_tar, read_members

PAYLOAD_COLUMNS = (
    "image", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img", "picture", "bytes",
)  # fmt: skip
"""Column names, in lower case, under which a table usually holds pictures or their paths."""


class PictureReader(Reader):
    """Reads folders, tables and tar files of pictures, and single pictures."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        """Read the pictures of a source.

        * A folder with its subfolders, in the order of the paths, which are the ids. The label `label` of a picture is
          the name of its top folder within the source. With a split column, the top folder names the part, and the next
          one the class.
        * A table: a column of paths, relative to the table, or of bytes (Parquet).
        * A tar file, in its own order. Labels are in members beside a picture, or in the folders as above.
        * A single picture.

        Raises:
            DataError: the source cannot be read or is none of these, or a record is refused and there is no
                `options.on_error`.
        """
        if not source.is_stdin and os.path.isdir(source.path):
            yield from _read_folder(source, options)
            return
        with open_source(source) as stream:
            head = stream.peek(BLOCK_BYTES)
            if is_tar(head, source):
                yield from _gather(source, options, read_members(stream, source, options))
            elif looks_like_picture(head) or source.path.lower().endswith(SUFFIXES):
                options.require_bare(source.name, "a single picture has none")
                id = source.name if source.is_stdin else source.path
                yield from _gather(source, options, [Found(id, stream.read(), {})], file=source.name)
            else:
                yield from _read_table(stream, source, options, _form(head, source, options))

    def files(self, source: Source, options: ReadOptions) -> list[Path]:
        """The other files that a source refers to: those in a folder, and those at the paths in a table.

        Raises:
            DataError: the folder holds no picture, or the source cannot be read.
        """
        if os.path.isdir(source.path):
            return [Path(source.path, path) for path in find_pictures(source).paths]
        with open_source(source) as stream:
            head = stream.peek(BLOCK_BYTES)
            if is_tar(head, source) or looks_like_picture(head) or source.path.lower().endswith(SUFFIXES):
                return []
            plain = ReadOptions(options.columns, options.foreign, on_error=lambda refusal: None)
            found: set[str] = set()
            for batch in read_table(stream, source, plain, _form(head, source, options), PAYLOAD_COLUMNS, True):
                for name in _inputs_of(options):
                    payloads = batch.column(INPUT_PREFIX + name)
                    found.update(payloads.to_pylist() if pa.types.is_large_string(payloads.type) else ())
        root = Path(source.path).parent
        return [root / path for path in found]


def _inputs_of(options: ReadOptions) -> list[str]:
    """Names of the inputs that this domain reads."""
    return [name for name in options.columns if name not in options.foreign]


def _form(head: bytes, source: Source, options: ReadOptions) -> TableFormat:
    form = table_format(head, (*PAYLOAD_COLUMNS, *options.columns, *options.named_columns))
    if form is None:
        raise DataError(f"{source.name}: not a picture, a folder, a table (CSV, TSV, Parquet) or a tar file")
    return form


def _read_folder(source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    replace(options, label_columns=(), split_column="").require_bare(source.name, "a folder has none")
    wrong = [name for name in options.label_columns if name != LABEL]
    if wrong:
        raise DataError(
            f"{source.name}: no column {wrong[0]!r}: a folder has one label, {LABEL!r}, the names of the folders in it"
        )
    has_parts = bool(options.split_column)
    pictures = find_pictures(source, has_parts)
    if options.label_columns:
        if not pictures.classes:
            raise DataError(
                f"{source.name}: pictures must lie in folders that name their classes for the label {LABEL!r}; "
                "these lie in none"
            )
        for name in pictures.empty:
            options.refuse(Refusal(f"{source.within}{name}/", 0, "", "a class folder must hold a picture; got none"))

    def contents() -> Iterator[Found]:
        for path in pictures.paths:
            label, part = class_and_part(path, has_parts)
            yield Found(path, _load(Path(source.path, path)), {LABEL: label, options.split_column: part})

    yield from _gather(source, options, contents())


def _load(path: Path) -> bytes | str:
    """The content of a file, or the reason why it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _fault(payload: bytes | str, is_checking: bool) -> str:
    if isinstance(payload, str):
        return payload
    try:
        if is_checking:
            check_picture(payload)
    except NoPicture as error:
        return str(error)
    return ""


def _gather(source: Source, options: ReadOptions, found: Iterable[Found], file: str = "") -> Iterator[pa.RecordBatch]:
    """Pictures in record batches of about `options.batch_bytes`, without those that are refused."""
    file = file or source.within

    def kept() -> Iterator[Found]:
        for one in found:
            id = one.id.encode("utf-8", "backslashreplace").decode()
            pictures = [one.payload, *(other for name, other in one.others.items() if name not in options.foreign)]
            fault = next(filter(None, (_fault(picture, options.is_checking) for picture in pictures)), "")
            fault = "the name of the file is not UTF-8" if id != one.id else fault
            if fault:
                options.refuse(Refusal(file, 0, id, fault))
            else:
                yield one

    for held in gather(kept(), lambda one: sum(map(len, (one.payload, *one.others.values()))), options.batch_bytes):
        yield _batch(held, file, options)


def _batch(found: list[Found], file: str, options: ReadOptions) -> pa.RecordBatch:
    extra: dict[str, pa.Array] = {}
    for column, name in ((GROUP, options.group_column), (SPLIT, options.split_column)):
        if name:
            extra[column] = pa.array([one.labels.get(name) for one in found], pa.string())
    for name in options.label_columns:
        try:
            extra[LABEL_PREFIX + name] = text_column([one.labels.get(name) for one in found])
        except DataError as error:
            raise DataError(f"{file}: label {name!r}: {error}") from error
    ids = pa.array([one.id for one in found], pa.string())
    inputs = {options.main: pa.array([one.payload for one in found], pa.large_binary())}
    for name in found[0].others:
        kind = pa.large_string() if name in options.foreign else pa.large_binary()
        inputs[name] = pa.array([one.others[name] for one in found], kind)
    return batch_of(ids, inputs, file, np.zeros(len(found), np.int64), extra)


def _read_table(
    stream: io.BufferedReader, source: Source, options: ReadOptions, form: TableFormat
) -> Iterator[pa.RecordBatch]:
    root = Path() if source.is_stdin else Path(source.path).parent

    def kept(batch: pa.RecordBatch) -> Iterator[tuple[int, list[bytes]]]:
        columns = [batch.column(INPUT_PREFIX + name) for name in names]
        for row in range(batch.num_rows):
            payloads = []
            for stored in (column[row].as_py() for column in columns):
                payload = stored if isinstance(stored, bytes) else _load(root / stored)
                if fault := _fault(payload, options.is_checking):
                    line, id = (batch.column(name)[row].as_py() for name in ("line", "id"))
                    named = "" if isinstance(stored, bytes) else f"{stored}: "
                    options.refuse(Refusal(source.name, line, id, f"{named}{fault}"))
                    break
                payloads.append(payload)
            else:
                yield row, payloads  # type: ignore[misc]

    names = _inputs_of(options)
    for batch in read_table(stream, source, options, form, PAYLOAD_COLUMNS, holds_files=True):
        for held in gather(kept(batch), lambda one: sum(map(len, one[1])), options.batch_bytes):
            rows, payloads = zip(*held)
            part = batch.take(pa.array(rows))
            for name, values in zip(names, zip(*payloads)):
                field = pa.field(INPUT_PREFIX + name, pa.large_binary(), False)
                at = part.schema.get_field_index(field.name)
                part = part.set_column(at, field, pa.array(values, field.type))
            yield part
