"""Labels of records from a fine-tuned model: one table, one row a record or a token, in input order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.errors import ConfigError
from meristem.inference.encoding import Reading
from meristem.inference.engine import Advance, unheard
from meristem.inference.formats import SUFFIXES, write_table_file
from meristem.inference.job import Job, Running
from meristem.inference.predictor import Predictor, table_columns
from meristem.model.model import Model
from meristem.model_directory import ModelCard
from meristem.types import TokenColumn


class RunningPredict(Running):
    """Predicts labels of token columns."""

    def __init__(self, job: "Predict", card: ModelCard, model: Model, device: str):
        trunk = job.trunk(model, device)
        self.reading = Reading.of(card)
        self.predictor = Predictor(trunk, job.labels)
        if job.is_per_token and all(readout.level == "record" for readout in self.predictor.readouts):
            raise ConfigError("one row a token needs a label of tokens; this model has labels of records only")
        self.tokens_per_batch = trunk.tokens_per_batch
        self.identity = {"label": [one.name for one in self.predictor.readouts], "per_token": job.is_per_token}
        self.facts = {"labels": self.identity["label"]}
        self.fault = "its prediction is not finite; the model is damaged"
        self._is_per_token, self._tokenizer = job.is_per_token, card.tokenizer
        self.is_reused = not job.is_per_token

    def rows(self, column: TokenColumn, advance: Advance = unheard) -> pa.Table:
        predictions = self.predictor.predict(column, advance)
        if not self._is_per_token:
            return pa.table(_arrays(table_columns(predictions, is_per_token=False)))
        lengths = self.num_values(column)
        symbols = column.payload_ids
        columns = _arrays(
            {
                "position": [place for n in lengths for place in range(1, n + 1)],
                "token": [self._tokenizer.vocab[symbol] if symbol >= 0 else "" for symbol in symbols],
                **table_columns(predictions, is_per_token=True),
            }
        )
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})

    def num_values(self, column: TokenColumn) -> np.ndarray:
        return column.payload_lengths if self._is_per_token else np.ones(len(column), np.int64)


@dataclass(frozen=True, kw_only=True)
class Predict(Job):
    """Predict labels.

    Attributes:
        labels: to predict; None for all that the model predicts.
        is_per_token: one row a token, of the labels that tokens have.
    """

    verb: ClassVar[str] = "predict"
    running: ClassVar[type[Running]] = RunningPredict
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    labels: tuple[str, ...] | None = None
    is_per_token: bool = False

    def finish(self, parts: Path, output: Path, manifest: dict[str, Any]) -> None:
        write_table_file(parts, output, is_exploded=self.is_per_token)


def _arrays(columns: Mapping[str, list[object]]) -> dict[str, pa.Array]:
    """Columns as Arrow arrays: numbers in fp32, since predictions are no more exact."""
    kinds = {float: pa.float32(), int: pa.int32()}
    return {name: pa.array(v, kinds.get(type(v[0]), pa.string()) if v else None) for name, v in columns.items()}
