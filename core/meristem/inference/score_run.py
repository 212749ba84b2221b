"""Scores of the records of files: a table with one row a record, or arrays by id, there when it is whole."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from meristem.data.records import ReadOptions, Refusal
from meristem.domain import GROUP, Domain, load_domain
from meristem.errors import ConfigError, DataError
from meristem.files import replacing
from meristem.inference.chunks import CHUNK_RECORDS, CHUNK_SYMBOLS, Chunk, ChunkReader
from meristem.inference.engine import PRECISIONS, best_device, best_precision
from meristem.inference.memory import fitting_tokens
from meristem.inference.run import Report, Silent
from meristem.inference.threads import ahead
from meristem.inference.trunks import runnable_trunk
from meristem.model_directory import load_any
from meristem.registry import find_all
from meristem.scoring.likelihood import LIKELIHOOD
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer

ARRAY_CHUNK_SYMBOLS = CHUNK_SYMBOLS // 16
"""Payload symbols of a chunk where results are arrays: pictures are large, and only one is scored at a time."""


@dataclass(frozen=True)
class Scored:
    """What came of it.

    Attributes:
        summary: what the values are, in one line.
        num_records: scored.
        num_renamed: arrays whose id had been used before; their names end in #2, #3 ...
        replaced: symbols that the tokenizer replaced, by `"old>new"`.
        refused: records that were left out (the first of them).
        num_refused: how many were.
    """

    summary: str
    num_records: int
    num_renamed: int
    replaced: dict[str, int]
    refused: list[Refusal]
    num_refused: int


def find_scorers(domain: str = "") -> dict[str, Scorer]:
    """The scorers that can be asked for by name: the likelihood, and those of a domain.

    Args:
        domain: whose scorers; empty for those of all installed domains.

    Raises:
        ConfigError: no such domain, or two domains give one name to different scorers.
    """
    found, owners = {"likelihood": LIKELIHOOD}, {"likelihood": "meristem"}
    domains: Mapping[str, Domain] = {domain: load_domain(domain)} if domain else find_all(GROUP)
    for owner, one in domains.items():
        for name, scorer in one.scorers.items():
            if found.setdefault(name, scorer) is not scorer:
                raise ConfigError(
                    f"scorer {name!r} is offered by {owners[name]} and by {owner}; say which domain with --domain"
                )
            owners.setdefault(name, owner)
    return found


def score_files(
    model: Path | str,
    inputs: Sequence[str],
    output: Path | str,
    scorer: Scorer = LIKELIHOOD,
    options: Any = None,
    *,
    plots: Path | str | None = None,
    tokens_per_batch: int | None = None,
    precision: str = "auto",
    domain: str = "",
    is_skipping: bool = False,
    read: ReadOptions | None = None,
    report: Report | None = None,
) -> Scored:
    """Score the records of files with a model.

    Args:
        output: a `.csv` or `.parquet` file, or an `.npz` where the scorer gives arrays.
        options: of the scorer; None for its defaults.
        plots: folder for a PNG of each array.

    Raises:
        ConfigError: options that cannot work, or a model that cannot be scored so.
        DataError: an input that cannot be used; no output is left behind.
    """
    output, report, options = Path(output), report or Silent(), scorer.options() if options is None else options
    has_arrays = scorer.schema is None
    suffixes = [".npz"] if has_arrays else [".csv", ".parquet"]
    if output.suffix not in suffixes:
        raise ConfigError(f"--output must end in {' or '.join(suffixes)} for this scorer; got {output}")
    if output.is_dir():
        raise ConfigError(f"--output must be a file; {output} is a directory")
    if plots is not None and scorer.draw is None:
        raise ConfigError("--plots has no effect on this scorer, which draws nothing; leave it out")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ConfigError(f"--tokens-per-batch must be 1 or more; got {tokens_per_batch}")
    card, loaded = load_any(model)
    device = best_device()
    precision = best_precision(precision, device)
    dtype = PRECISIONS[precision]
    trunk = runnable_trunk(loaded.to(device).eval(), dtype)
    if tokens_per_batch is None:
        tokens_per_batch = fitting_tokens(loaded.config, trunk.device, dtype)
    running = RunningModel(
        loaded, trunk, card.tokenizer, tokens_per_batch, lambda tokens: report.advance(records=0, tokens=tokens)
    )
    summary = scorer.describe(running, options)
    if not (domain or card.domain):
        raise ConfigError("the model names no domain; say which one reads the input with --domain")
    its_domain = load_domain(domain or card.domain)

    def reader() -> ChunkReader:
        return ChunkReader(
            its_domain,
            card.tokenizer,
            inputs,
            read or ReadOptions(),
            is_skipping,
            ARRAY_CHUNK_SYMBOLS if has_arrays else CHUNK_SYMBOLS,
            loaded.config.max_length,
        )

    counted = None if "-" in inputs else reader()
    work = sum(int(scorer.work(running, chunk.column, options).sum()) for chunk in counted or ())
    report.chose(device, precision, tokens_per_batch)  # once nothing is wrong with the input
    report.found(None if counted is None else counted.num_records, None if counted is None else work)
    chunks = reader()
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, ahead(chunks) as stream:
        schema = None if scorer.schema is None else scorer.schema(running, options)
        target = _Arrays(temporary) if schema is None else _Rows(temporary, output.suffix, schema)
        number = 0
        with closing(target):
            for chunk in stream:
                for row, result in _checked(chunk, scorer.score(running, chunk.column, options)):
                    name = target.add(chunk.ids[row].as_py(), result)
                    number += 1
                    if plots is not None and scorer.draw is not None:
                        alone = chunk.column.take(np.array([row]))
                        scorer.draw(_picture(Path(plots), number, name), name, result, running, alone)
                    report.advance(records=1, tokens=0)
    replaced, refused = dict(chunks.replaced), chunks.refused
    return Scored(summary, number, target.num_renamed, replaced, refused, chunks.num_refused)


def _checked(chunk: Chunk, results: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Each result with its row of the chunk.

    Raises:
        DataError: a value of a row, or a whole slice of an array, is not finite.
    """
    for row, result in enumerate(results):
        if isinstance(result, np.ndarray):  # nan may stand where there is nothing, but not everywhere
            is_right = bool(np.isfinite(result).any(axis=tuple(range(1, result.ndim))).all())
        else:
            is_right = all(np.isfinite(value) for value in result.values() if isinstance(value, float))
        if not is_right:
            raise DataError(f"{chunk.name(row)}: its score is not finite; the model is damaged")
        yield row, result


class _Rows:
    """A table that is written a thousand rows at a time."""

    num_renamed = 0

    def __init__(self, path: Path, suffix: str, schema: pa.Schema):
        self._schema = pa.schema([pa.field("id", pa.string()), *schema])
        kind = pa.csv.CSVWriter if suffix == ".csv" else pa.parquet.ParquetWriter
        self._writer, self._rows = kind(path, self._schema), list[dict[str, Any]]()

    def add(self, id: str, row: Mapping[str, Any]) -> str:
        """Add the row of a record; gives back its id."""
        self._rows.append({"id": id, **row})
        if len(self._rows) == CHUNK_RECORDS:
            self._flush()
        return id

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


class _Arrays:
    """Arrays by id as numpy's `.npz`, each of which is written as it comes; no two have one name."""

    def __init__(self, path: Path):
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
        self._names: set[str] = set()
        self._seen: Counter[str] = Counter()
        self.num_renamed = 0

    def add(self, id: str, values: np.ndarray) -> str:
        """Add the array of a record; gives back its name, which is the id, or the id and `#2`, `#3` ..."""
        name = id
        while name in self._names:
            self._seen[id] += 1
            name = f"{id}#{self._seen[id] + 1}"
        self._names.add(name)
        self.num_renamed += name != id
        with self._file.open(f"{name}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, values)
        return name

    def close(self) -> None:
        self._file.close()


def _picture(folder: Path, number: int, name: str) -> Path:
    """Where the figure of a record goes."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number:05}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:80]}.png"
