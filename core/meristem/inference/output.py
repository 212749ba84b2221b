"""The folder that rows are written to: parts, each whole or not there, and a manifest.

A part is written under a temporary name, synced and renamed, and carries which run it belongs to and which input it
ends with. So a run killed at any moment leaves finished parts, and the same run goes on behind them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meristem.errors import ConfigError, DataError
from meristem.files import TEMPORARY, read_json, replacing, write_json
from meristem.inference.chunks import Chunk
from meristem.inference.dedupe import Sources

MANIFEST = "manifest.json"
METADATA_KEY = b"meristem"
PAYLOAD = "payload"
"""Column of a part that holds the payload of each record, where a job keeps it."""

CACHED_PARTS = 16
"""Parts whose rows are kept in memory for records that come again."""

Identity = Mapping[str, Any]
"""What a run is known by: model, input, and the options that decide what is in a part."""

DIFFERENCES = {
    "model": "another model",
    "input": "another input",
    "device": "device {}, and this is {}",
    "chunk": "other chunks (another version of meristem)",
}
"""What to say of a folder whose identity differs; of other keys the option of that name is said."""


class OutputDirectory:
    """Claims a folder for one run, and knows what of it is done.

    Args:
        path: new, empty, or of the same run.
    """

    def __init__(self, path: Path):
        self.path = path

    def check_foreign(self) -> None:
        """Refuse a place that no run of ours can use, before any work is done.

        Raises:
            ConfigError: a file, or a folder that holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} must be a directory, new or of the same run; it is a file")
        if self.path.is_dir() and not (self.path / MANIFEST).exists():
            others = sorted(item.name for item in self.path.iterdir() if not item.name.endswith(TEMPORARY))
            if others:
                raise ConfigError(
                    f"--output {self.path} must be new, empty or of the same run; it holds {others[0]!r}; "
                    "name another directory"
                )

    def check_identity(self, identity: Identity) -> None:
        """Refuse a folder that belongs to another run.

        Raises:
            ConfigError: says what differs.
        """
        if not (self.path / MANIFEST).exists():
            return
        had = read_manifest(self.path).get("run", {})
        for key, value in identity.items():
            if had.get(key) != value:
                said = DIFFERENCES.get(key, f"--{key.replace('_', '-')} {{}}, and this is {{}}")
                raise ConfigError(
                    f"--output {self.path} belongs to a run with {said.format(had.get(key), value)}; "
                    "name another directory, or remove this one"
                )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, and keep others out until the block ends.

        Raises:
            ConfigError: it cannot be made, or another process is writing there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--output {self.path}: another process is writing there; wait for it") from error
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be made: {error.strerror or error}") from error
        try:
            self._clear()
            yield
        finally:
            os.close(lock)

    def remove(self) -> None:
        """Take back the manifest and the parts, and the folder where nothing else is in it."""
        for index in reversed(range(self.count_parts())):
            self.part(index).unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._clear()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _clear(self) -> None:
        """Remove what a killed run left half written."""
        for name in ("part-*.parquet", MANIFEST, "embeddings.*", f"{self.path.stem}*"):
            for leftover in self.path.glob(f"{name}.*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)

    def part(self, index: int) -> Path:
        return self.path / f"part-{index:05d}.parquet"

    def count_parts(self) -> int:
        """Finished parts, from the first on without a gap."""
        index = 0
        while self.part(index).exists():
            index += 1
        return index

    def part_facts(self, index: int) -> dict[str, Any]:
        """What a part says of itself: run, digest of the input up to its end, seconds up to then."""
        try:
            metadata = pq.read_schema(self.part(index)).metadata or {}
            return dict(json.loads(metadata[METADATA_KEY]))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{self.part(index)}: no part of a run ({error}); remove the directory") from error

    def write_manifest(self, values: Mapping[str, Any]) -> None:
        """Replace the manifest at once."""
        write_json(self.path / MANIFEST, values)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder of parts.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if not (path / MANIFEST).exists():
        raise DataError(f"{path}: no directory of vectors ({MANIFEST} is missing)")
    return read_json(path / MANIFEST)


def parts_of(path: Path) -> list[Path]:
    """Finished parts in order, without those whose records were all refused: these have no columns to speak of."""
    parts = sorted(path.glob("part-*.parquet"), key=lambda part: int(part.stem.removeprefix("part-")))
    return [part for part in parts if pq.read_metadata(part).num_rows]


def run_id(identity: Identity) -> str:
    """Short name of a run."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


class PartWriter:
    """Assembles parts in order: rows that are new, and those of equal sequences that stand in earlier parts.

    Args:
        keeps_payloads: the payload of each record is put beside its id.
    """

    def __init__(self, output: OutputDirectory, run: str, keeps_payloads: bool = False):
        self._output, self._run, self._keeps_payloads = output, run, keeps_payloads
        self._rows_of = lru_cache(CACHED_PARTS)(self._read_rows)

    def write(self, chunk: Chunk, sources: Sources, new_rows: pa.Table, seconds: float) -> None:
        """Write the part of a chunk.

        Args:
            new_rows: of the sequences in `sources.new_rows`.

        Raises:
            DataError: the disk is full.
        """
        rows = self._assemble(chunk, sources, new_rows).add_column(0, "id", chunk.ids.cast(pa.string()))
        if self._keeps_payloads:
            rows = rows.add_column(1, PAYLOAD, chunk.payloads)
        facts = {"run": self._run, "digest": chunk.digest, "seconds": round(seconds, 3)}
        table = rows.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
        path = self._output.part(chunk.index)
        try:
            with replacing(path) as temporary:
                # floats of vectors do not get smaller
                pq.write_table(table, temporary, compression="none", use_dictionary=["tokens.list.element"])
        except OSError as error:
            if "No space left" not in str(error):  # Arrow hides the number of the error in its text
                raise
            raise DataError(
                f"{path.parent}: no space left on device; finished parts stay: free some and run the same command again"
            ) from error

    def _assemble(self, chunk: Chunk, sources: Sources, new_rows: pa.Table) -> pa.Table:
        if len(sources.new_rows) == len(chunk):
            return new_rows
        tables: list[pa.Table] = []
        starts, num_rows = {}, 0
        for part in np.unique(sources.parts).tolist():
            # without a new row there are no columns to speak of
            rows = new_rows if part == chunk.index else self._rows_of(part)
            tables.append(rows.cast(tables[0].schema) if tables else rows)
            starts[part] = num_rows
            num_rows += len(rows)
        is_here = sources.parts == chunk.index
        places = np.where(is_here, np.searchsorted(sources.new_rows, sources.rows), sources.rows)
        index = places + np.array([starts[part] for part in sources.parts.tolist()])
        return pa.concat_tables(tables).combine_chunks().take(pa.array(index))

    def _read_rows(self, part: int) -> pa.Table:
        own = ["id", *([PAYLOAD] if self._keeps_payloads else [])]  # of each record, whatever its row
        return pq.read_table(self._output.part(part)).drop_columns(own)


def part_vectors(path: Path) -> np.ndarray:
    """`[R, D]` all vectors of a part, end to end."""
    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)
