"""One file made of finished parts: tables, and vectors as HDF5 and npz; vectors are read back.

Files are made part by part, so memory stays flat, under a temporary name.
"""

import csv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meristem.errors import DataError
from meristem.files import replacing
from meristem.inference.output import MANIFEST, part_vectors, parts_of, read_manifest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".parquet")

ID_ATTRIBUTE = "original_id"
"""Attribute of an HDF5 dataset that holds the id, as biotrainer reads it."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors of records in memory, in the order of the input.

    Attributes:
        ids: `[N]` names of the records.
        values: `[R, D]` vectors end to end: one a record, or one a token.
        offsets: `[N + 1]` where the vectors of each record begin.
        is_pooled: one vector a record.
    """

    ids: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    is_pooled: bool

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> np.ndarray:
        """`[D]` the vector of a record, or `[n, D]` those of its tokens."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        start, stop = self.offsets[row % len(self)], self.offsets[row % len(self) + 1]
        return self.values[start] if self.is_pooled else self.values[start:stop]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))


def read_embeddings(path: Path | str, allow_incomplete: bool = False) -> Embeddings:
    """Read what `meristem embed` wrote: its directory, or the HDF5 or npz file in it.

    Args:
        allow_incomplete: read the finished parts of a run that was stopped.

    Raises:
        DataError: nothing of the kind, or a run that was stopped.

    Example:
        >>> vectors = read_embeddings("vectors")
        >>> vectors.ids[0], vectors[0].shape
    """
    pieces = list(iter_embeddings(path, allow_incomplete))
    starts = np.cumsum([0, *(len(piece.values) for piece in pieces)])
    return Embeddings(
        ids=np.concatenate([piece.ids for piece in pieces]) if pieces else np.zeros(0, object),
        values=np.concatenate([piece.values for piece in pieces]) if pieces else np.zeros((0, 0), np.float32),
        offsets=np.concatenate([[0], *(piece.offsets[1:] + start for piece, start in zip(pieces, starts))]),
        is_pooled=all(piece.is_pooled for piece in pieces),
    )


def iter_embeddings(path: Path | str, allow_incomplete: bool = False) -> Iterator[Embeddings]:
    """The same, piece by piece, for more vectors than fit in memory."""
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[Embeddings]]] = {".npz": _iter_npz, ".h5": _iter_h5}
    if path.is_dir():
        manifest = read_manifest(path)
        if not manifest.get("complete") and not allow_incomplete:
            raise DataError(
                f"{path}: the run was stopped before its end ({manifest.get('parts')} parts are there); run the same "
                "command again, or allow_incomplete=True"
            )
        files = [file for suffix in readers if (file := path / f"embeddings{suffix}").exists()]
        if not files or (path / "part-00000.parquet").exists():
            return _iter_parts(path)
        path = files[0]
    if path.suffix not in readers or not path.is_file():
        raise DataError(f"{path}: must be a directory with {MANIFEST}, or its .h5 or .npz file")
    return readers[path.suffix](path)


def _iter_parts(path: Path) -> Iterator[Embeddings]:
    for part in parts_of(path):
        columns = pq.read_schema(part).names
        is_pooled = "tokens" not in columns
        ids, lengths = np.array(_column(part, "id").to_pylist(), object), _column(part, "length").to_numpy()
        offsets = np.cumsum([0, *(np.ones_like(lengths) if is_pooled else lengths)], dtype=np.int64)
        yield Embeddings(ids, part_vectors(part), offsets, is_pooled)


def _column(part: Path, name: str) -> pa.ChunkedArray:
    return pq.read_table(part, columns=[name])[name]


def _iter_h5(path: Path) -> Iterator[Embeddings]:
    import h5py

    with h5py.File(path) as file:
        block = 1024
        for first in range(0, len(file), block):
            sets = [file[str(row)] for row in range(first, min(first + block, len(file)))]
            values = [np.atleast_2d(item[()]) for item in sets]
            yield Embeddings(
                ids=np.array([item.attrs[ID_ATTRIBUTE] for item in sets], object),
                values=np.concatenate(values),
                offsets=np.cumsum([0, *map(len, values)]),
                is_pooled=sets[0].ndim == 1,
            )


def _iter_npz(path: Path) -> Iterator[Embeddings]:
    with np.load(path, allow_pickle=False) as file:
        yield Embeddings(file["ids"].astype(object), file["embeddings"], file["offsets"], bool(file["is_pooled"]))


def _write_h5(path: Path, target: Path, num_records: int, num_vectors: int) -> None:
    import h5py

    with h5py.File(target, "w") as file:
        row = 0
        for piece in _iter_parts(path):
            for name, vector in zip(piece.ids, piece):
                file.create_dataset(str(row), data=vector).attrs[ID_ATTRIBUTE] = name
                row += 1
        assert row == num_records


def _write_npz(path: Path, target: Path, num_records: int, num_vectors: int) -> None:
    parts = parts_of(path)
    kind = pq.read_schema(parts[0]).field("embedding").type
    is_pooled = pa.types.is_fixed_size_list(kind)
    width = kind.list_size if is_pooled else kind.value_type.list_size
    id_type = f"<U{max(1, *(len(id) for part in parts for id in _column(part, 'id').to_pylist()))}"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with _entry(archive, "ids", (num_records,), id_type) as stream:
            for part in parts:
                stream.write(np.array(_column(part, "id").to_pylist(), id_type).tobytes())
        with _entry(archive, "embeddings", (num_vectors, width), "<f4") as stream:
            for part in parts:
                stream.write(np.ascontiguousarray(part_vectors(part)).data)
        with _entry(archive, "offsets", (num_records + 1,), "<i8") as stream:
            ends = np.zeros(1, "<i8")
            stream.write(ends.tobytes())
            for part in parts:
                lengths = _column(part, "length").to_numpy().astype("<i8")
                ends = ends[-1] + np.cumsum(np.ones_like(lengths) if is_pooled else lengths)
                stream.write(ends.astype("<i8").tobytes())
        with _entry(archive, "is_pooled", (), "|b1") as stream:
            stream.write(np.array(is_pooled).tobytes())


def _entry(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> IO[bytes]:
    """An array of an npz file whose values follow in blocks."""
    stream = archive.open(f"{name}.npy", "w", force_zip64=True)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream


WRITERS: dict[str, Callable[[Path, Path, int, int], None]] = {"h5": _write_h5, "npz": _write_npz}
"""Writers of one file from the folder of finished parts, given also the numbers of records and vectors; by format."""


def write_table_file(parts: Path, output: Path, is_exploded: bool = False) -> None:
    """Write the rows of all parts to one file, which is there when it is whole.

    Args:
        output: its ending, one of `SUFFIXES`, says how; fp32 numbers in text have six digits, fp64 ones all.
        is_exploded: each entry of the lists in a row becomes a row of its own.
    """
    # a killed process leaves its half among the parts, which the next one clears away
    with replacing(output, parts) as temporary:
        if output.suffix == ".parquet":
            tables = _tables(parts, is_exploded)
            first = next(tables)
            with pq.ParquetWriter(temporary, first.schema) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table.cast(first.schema))
            return
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            lines = csv.writer(stream, delimiter=DELIMITERS[output.suffix], lineterminator="\n")
            for number, table in enumerate(_tables(parts, is_exploded)):
                if not number:
                    lines.writerow(table.column_names)
                lines.writerows(zip(*map(_texts, table.columns)))


def _tables(parts: Path, is_exploded: bool) -> Iterator[pa.Table]:
    for part in parts_of(parts):
        table = pq.read_table(part).replace_schema_metadata(None)
        if is_exploded:
            lists = [name for name, kind in zip(table.column_names, table.schema.types) if pa.types.is_list(kind)]
            parents = pc.list_parent_indices(table[lists[0]].combine_chunks())
            table = pa.table(
                {n: pc.list_flatten(table[n]) if n in lists else table[n].take(parents) for n in table.column_names}
            )
        yield table


def _texts(column: pa.ChunkedArray) -> list[object]:
    """The values of a column as the text of a table has them."""
    values: list[object] = column.to_pylist()
    if not pa.types.is_float32(column.type):
        return values
    return [f"{value:.6g}" if isinstance(value, float) else value for value in values]
