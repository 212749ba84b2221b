"""Label files: one table, one row a record or a token, in input order, there when it is whole."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meristem.data.records import ReadOptions, Refusal
from meristem.domain import load_domain
from meristem.errors import ConfigError, DataError
from meristem.files import replacing
from meristem.inference.chunks import Chunk, ChunkReader
from meristem.inference.engine import PRECISIONS, NotFinite, TrunkRunner, best_device, best_precision
from meristem.inference.predict import Predictor, record_columns, token_columns
from meristem.inference.run import Report, Silent
from meristem.inference.threads import ahead
from meristem.model_directory import load_any

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".parquet")


@dataclass(frozen=True)
class Predicted:
    """What came of it.

    Attributes:
        num_records: labelled.
        num_rows: of the table.
        replaced: symbols that the tokenizer replaced, by `"old>new"`.
        refused: records that were left out (the first of them).
        num_refused: how many were.
    """

    num_records: int
    num_rows: int
    replaced: dict[str, int]
    refused: list[Refusal]
    num_refused: int


def predict_files(
    model: Path | str,
    inputs: Sequence[str],
    output: Path | str,
    *,
    is_per_token: bool = False,
    labels: Sequence[str] | None = None,
    tokens_per_batch: int | None = None,
    precision: str = "auto",
    domain: str = "",
    is_skipping: bool = False,
    read: ReadOptions | None = None,
    report: Report | None = None,
) -> Predicted:
    """Label the records of files with a fine-tuned model.

    Args:
        output: a `.csv`, `.tsv` or `.parquet` file.
        is_per_token: one row a token, of the labels that tokens have.
        labels: to predict; None for all that the model predicts.

    Raises:
        ConfigError: options that cannot work, or a model that predicts nothing.
        DataError: an input that cannot be used; nothing is left behind.
    """
    output, report, read = Path(output), report or Silent(), read or ReadOptions()
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"--output must end in {', '.join(SUFFIXES)}; got {output}")
    if output.is_dir():
        raise ConfigError(f"--output must be a file; {output} is a directory")
    card, loaded = load_any(model)
    device, tokenizer = best_device(), card.tokenizer
    precision = best_precision(precision, device)
    trunk = TrunkRunner(loaded, tokenizer.num_special, -1, tokens_per_batch, PRECISIONS[precision], device)
    predictor = Predictor(trunk, labels)
    if is_per_token and all(readout.level == "record" for readout in predictor.readouts):
        raise ConfigError("one row a token needs a label of tokens; this model has labels of records only")
    its_domain = load_domain(domain or card.domain)

    def reader() -> ChunkReader:
        return ChunkReader(its_domain, tokenizer, inputs, read, is_skipping)

    counted = None if "-" in inputs else reader()
    for _ in counted or ():
        pass
    report.chose(device, precision, trunk.tokens_per_batch)  # once nothing is wrong with the input
    if counted is None:
        report.found(None, None)
    else:
        report.found(counted.num_records, counted.num_symbols)
    special = sum(tokenizer.num_special)
    chunks, num_rows = reader(), 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, _table(temporary, output.suffix) as table, ahead(chunks) as stream:
        for chunk in stream:
            columns = _columns(
                predictor,
                chunk,
                is_per_token,
                tokenizer,
                lambda records, tokens: report.advance(records, tokens - records * special),
            )
            table.write(columns)
            num_rows += len(columns["id"])
    return Predicted(chunks.num_records, num_rows, dict(chunks.replaced), chunks.refused, chunks.num_refused)


def _columns(
    predictor: Predictor, chunk: Chunk, is_per_token: bool, tokenizer: Any, advance: Any
) -> dict[str, list[object]]:
    try:
        predictions = predictor.predict(chunk.column, advance)
    except NotFinite as error:
        raise DataError(f"{chunk.name(error.row)}: its prediction is not finite; the model is damaged") from error
    ids = chunk.ids.to_pylist()
    if not is_per_token:
        return {"id": ids, **record_columns(predictions)}
    before, behind = tokenizer.num_special
    lengths = chunk.column.lengths - before - behind
    rows = [row for row in range(len(chunk)) for _ in range(lengths[row])]
    is_payload = np.concatenate([np.r_[[False] * before, [True] * n, [False] * behind] for n in lengths]).astype(bool)
    return {
        "id": [ids[row] for row in rows],
        "position": [place for n in lengths for place in range(1, n + 1)],
        "token": [tokenizer.vocab[symbol] if symbol >= 0 else "" for symbol in chunk.column.ids[is_payload]],
        **token_columns(predictions),
    }


class _Table(Protocol):
    def write(self, columns: dict[str, list[object]]) -> None: ...


@contextmanager
def _table(path: Path, suffix: str) -> Iterator[_Table]:
    if suffix == ".parquet":
        table = _Parquet(path)
        try:
            yield table
        finally:
            table.close()
        return
    with path.open("w", newline="", encoding="utf-8") as stream:
        yield _Text(stream, DELIMITERS[suffix])


class _Text:
    def __init__(self, stream: Any, delimiter: str):
        self._writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        self._is_begun = False

    def write(self, columns: dict[str, list[object]]) -> None:
        if not self._is_begun:
            self._writer.writerow(columns)
            self._is_begun = True
        texts = [[f"{v:.6g}" if isinstance(v, float) else v for v in column] for column in columns.values()]
        self._writer.writerows(zip(*texts))


class _Parquet:
    def __init__(self, path: Path):
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, columns: dict[str, list[object]]) -> None:
        arrays = {name: pa.array(values, _type_of(values)) for name, values in columns.items()}
        batch = pa.table(arrays)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, batch.schema)
        self._writer.write_table(batch.cast(self._writer.schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _type_of(values: list[object]) -> pa.DataType:
    first = values[0] if values else ""
    return pa.float32() if isinstance(first, float) else pa.int32() if isinstance(first, int) else pa.string()
