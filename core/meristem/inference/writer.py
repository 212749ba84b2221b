"""The directory that vectors are written to: parts, each whole or not there, and a manifest.

A part is written to a temporary name, synced and renamed, and carries which run it belongs to and which input it
ends with. So a run killed at any moment leaves finished parts, and the same run goes on behind them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
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
CACHED_PARTS = 16
"""Parts whose vectors are kept in memory for records that come again."""

Identity = Mapping[str, Any]
"""What a run is known by: model, input, and the options that decide what is in a part."""

DIFFERENCES = {
    "model": "another model",
    "input": "another input",
    "pool": "--pool {}, and this is {}",
    "layer": "--layer {}, and this is {}",
    "precision": "--precision {}, and this is {}",
    "device": "device {}, and this is {}",
    "chunk": "other chunks (another version of meristem)",
}
"""What to say of a directory whose identity differs."""


class OutputDirectory:
    """Claims a directory for one run, and knows what of it is done.

    Args:
        path: new, empty, or of the same run.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    def check_foreign(self) -> None:
        """Refuse a place that no run of ours can use, before any work is done.

        Raises:
            ConfigError: a file, or a directory that holds something else.
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
        """Refuse a directory that belongs to another run.

        Raises:
            ConfigError: says what differs.
        """
        if not (self.path / MANIFEST).exists():
            return
        had = self.read_manifest().get("run", {})
        for key, value in identity.items():
            if had.get(key) != value:
                raise ConfigError(
                    f"--output {self.path} belongs to a run with {DIFFERENCES[key].format(had.get(key), value)}; "
                    "name another directory, or remove this one"
                )

    def claim(self) -> None:
        """Make the directory and keep others out until `release`.

        Raises:
            ConfigError: it cannot be made, or another process is writing there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--output {self.path}: another process is writing there; wait for it") from error
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be made: {error.strerror or error}") from error
        for name in ("part-*.parquet", MANIFEST, "embeddings.*"):  # what a killed run left half written
            for leftover in self.path.glob(f"{name}.*{TEMPORARY}"):
                leftover.unlink()

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Take back the manifest, and the directory where nothing else is in it."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

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
            raise DataError(f"{self.part(index)}: no part of vectors ({error}); remove the directory") from error

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as plain values."""
        return read_manifest(self.path)

    def write_manifest(self, values: Mapping[str, Any]) -> None:
        """Replace the manifest at once."""
        write_json(self.path / MANIFEST, values)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory of vectors.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if not (path / MANIFEST).exists():
        raise DataError(f"{path}: no directory of vectors ({MANIFEST} is missing)")
    return read_json(path / MANIFEST)


def run_id(identity: Identity) -> str:
    """Short name of a run."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


class PartWriter:
    """Assembles parts in order: vectors that are new, and those of equal sequences that stand in earlier parts.

    Args:
        output: where to.
        run: short name of the run, put into each part.
        width: of a vector.
        is_pooled: one vector a record.
        vocab: symbols by id; named beside vectors of tokens.
        num_special: special rows before and behind each payload.
    """

    def __init__(
        self,
        output: OutputDirectory,
        run: str,
        width: int,
        is_pooled: bool,
        vocab: tuple[str, ...],
        num_special: tuple[int, int],
    ):
        self._output, self._run, self._width, self._is_pooled = output, run, width, is_pooled
        self._vocab, self._num_special = pa.array(vocab, pa.string()), num_special
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def write(self, chunk: Chunk, sources: Sources, new_values: np.ndarray, seconds: float) -> None:
        """Write the part of a chunk.

        Args:
            new_values: vectors of the sequences in `sources.new_rows`, end to end.
            seconds: of work up to here.
        """
        lengths = chunk.column.lengths - sum(self._num_special)
        columns = {"id": chunk.ids.cast(pa.string()), "length": pa.array(lengths, pa.int32())}
        place = np.searchsorted(sources.new_rows, sources.rows)
        if self._is_pooled:
            values = np.empty((len(chunk), self._width), np.float32)
            is_here = sources.parts == chunk.index
            values[is_here] = new_values[place[is_here]]
            for part in np.unique(sources.parts[~is_here]):
                rows = sources.parts == part
                values[rows] = self._vectors_of(int(part))[sources.rows[rows]]
            columns["embedding"] = _vectors(values)
        else:
            columns["tokens"], columns["embedding"] = self._token_columns(chunk, lengths, sources, place, new_values)
        facts = {"run": self._run, "digest": chunk.digest, "seconds": round(seconds, 3)}
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
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

    def _token_columns(
        self, chunk: Chunk, lengths: np.ndarray, sources: Sources, place: np.ndarray, new_values: np.ndarray
    ) -> tuple[pa.Array, pa.Array]:
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        new_starts = np.concatenate([[0], np.cumsum(lengths[sources.new_rows])])[:-1]
        if len(sources.new_rows) == len(chunk):
            values = new_values
        else:
            index = np.repeat(new_starts[place] - bounds[:-1], lengths) + np.arange(bounds[-1])
            values = new_values[index]
        starts = chunk.column.offsets[:-1] + self._num_special[0]
        symbols = chunk.column.ids[np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])]
        offsets = pa.array(bounds, pa.int32())
        # a patch is no symbol
        tokens = pa.DictionaryArray.from_arrays(pa.array(symbols, pa.int32(), mask=symbols < 0), self._vocab)
        return pa.ListArray.from_arrays(offsets, tokens), pa.ListArray.from_arrays(offsets, _vectors(values))

    def _vectors_of(self, part: int) -> np.ndarray:
        if part not in self._cache:
            self._cache[part] = part_vectors(self._output.part(part))
            while len(self._cache) > CACHED_PARTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(part)
        return self._cache[part]


def _vectors(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def part_vectors(path: Path) -> np.ndarray:
    """`[R, D]` all vectors of a part, end to end."""
    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)
