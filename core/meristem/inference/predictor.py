"""From token columns to what the heads of a fine-tuned model say of them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from meristem.errors import ConfigError
from meristem.inference.engine import Advance, NotFinite, TrunkRunner, views_of
from meristem.model.heads import Readout
from meristem.model.outputs import HeadRequest, Wanted
from meristem.shapes import Float, Tensor
from meristem.types import TokenColumn


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one head says of the sequences of a column.

    Attributes:
        readout: what it predicts.
        values: `[N, C]` probabilities of the classes, or values in the unit of the labels; `[sum of payload
            tokens, C]` for a readout of tokens.
        lengths: `[N]` rows that each sequence has in `values`.
    """

    readout: Readout
    values: np.ndarray
    lengths: np.ndarray

    @property
    def classes(self) -> list[str]:
        """Name of the likeliest class of each row."""
        return [self.readout.classes[best] for best in self.values.argmax(1)]

    def split(self) -> list[np.ndarray]:
        """The rows of each sequence."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1])


class Predictor:
    """Predictions for the sequences of a column, in its order.

    Args:
        trunk: runs the model; of its last layer, which heads are trained on.
        readouts: names of the labels to predict; None for all.

    Raises:
        ConfigError: the model predicts no label, or not that one.
    """

    def __init__(self, trunk: TrunkRunner, readouts: Sequence[str] | None = None):
        there = {readout.name: readout for readout in trunk.model.readouts}
        if not there:
            raise ConfigError(
                "the model must predict a label, and this one was not trained on any; "
                "use meristem embed, or fine-tune it with meristem fit"
            )
        for name in readouts or ():
            if name not in there:
                raise ConfigError(f"the label must be one of {', '.join(there)}; got {name!r}")
        self.trunk = trunk
        self.readouts = tuple(there[name] for name in (readouts or there))

    @torch.inference_mode()
    def predict(self, column: TokenColumn, advance: Advance | None = None) -> dict[str, Prediction]:
        """Predictions by the name of the label.

        Raises:
            NotFinite: names the first sequence whose prediction is not finite.
        """
        if column.views:
            is_per_token = not all(map(_is_pooled, self.readouts))
            return _mean_of([self.predict(view, advance) for view in views_of(column, is_per_token)])
        token_lengths = column.payload_lengths
        found = {
            readout.name: _empty(readout, np.ones(len(column), np.int64) if _is_pooled(readout) else token_lengths)
            for readout in self.readouts
        }
        names = [readout.name for readout in self.readouts]
        wanted = Wanted(dict.fromkeys(names, HeadRequest(rounds_alike=True)), num_first=0, is_source_only=True)
        for rows in self.trunk.run(column, wanted):
            for readout in self.readouts:
                into = found[readout.name]
                ends = np.cumsum(into.lengths)
                values = in_units(readout, rows.outputs.heads[readout.name].float()).cpu().numpy()
                if _is_pooled(readout):
                    into.values[list(rows.records)] = values
                    continue
                for record, own in zip(rows.records, rows.payloads_of(values)):
                    into.values[ends[record] - into.lengths[record] : ends[record]] = own
            if advance is not None:
                advance(len(rows.records), int(token_lengths[list(rows.records)].sum()))
        for prediction in found.values():
            _check_finite(prediction)
        return found


def _mean_of(views: list[dict[str, Prediction]]) -> dict[str, Prediction]:
    """What is predicted for all views of each record together."""
    return {
        name: replace(first, values=np.mean([view[name].values for view in views], axis=0))
        for name, first in views[0].items()
    }


def in_units(readout: Readout, outputs: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """Outputs of a head as probabilities of classes, or as values in the unit of the labels."""
    if readout.task == "classification":
        return outputs.softmax(-1)
    scale, shift = (torch.tensor(part, device=outputs.device) for part in (readout.std, readout.mean))
    return outputs * scale + shift


def _is_pooled(readout: Readout) -> bool:
    return readout.level == "record"


def _empty(readout: Readout, lengths: np.ndarray) -> Prediction:
    return Prediction(readout, np.empty((int(lengths.sum()), readout.num_outputs), np.float32), lengths)


def _check_finite(prediction: Prediction) -> None:
    bad = np.flatnonzero(~np.isfinite(prediction.values).all(1))
    if len(bad):
        raise NotFinite(int(np.searchsorted(np.cumsum(prediction.lengths), bad[0], side="right")))


def record_columns(predictions: Mapping[str, Prediction]) -> dict[str, list[object]]:
    """Columns with one row a record: class and probabilities, or the value; tokens as one text.

    Classes of tokens are one character each where all their names are, else words with spaces between.
    """
    columns: dict[str, list[object]] = {}
    for name, prediction in predictions.items():
        readout = prediction.readout
        if _is_pooled(readout):
            columns |= _row_columns(name, prediction)
        elif readout.task == "classification":
            is_short = all(len(word) == 1 for word in readout.classes)
            bounds = np.concatenate([[0], np.cumsum(prediction.lengths)])
            names = prediction.classes
            columns[name] = [
                ("" if is_short else " ").join(names[start:stop]) for start, stop in itertools.pairwise(bounds)
            ]
        else:
            for suffix, output in _outputs(readout):
                columns[name + suffix] = [
                    " ".join(f"{value:.6g}" for value in rows[:, output]) for rows in prediction.split()
                ]
    return columns


def token_columns(predictions: Mapping[str, Prediction]) -> dict[str, list[object]]:
    """Columns with one row a token, of the labels that tokens have.

    Raises:
        ConfigError: no label is of tokens.
    """
    columns: dict[str, list[object]] = {}
    for name, prediction in predictions.items():
        if not _is_pooled(prediction.readout):
            columns |= _row_columns(name, prediction)
    if not columns:
        raise ConfigError("one row a token needs a label of tokens; this model has labels of records only")
    return columns


def _row_columns(name: str, prediction: Prediction) -> dict[str, list[object]]:
    readout, values = prediction.readout, prediction.values
    columns: dict[str, list[object]] = {}
    if readout.task == "classification":
        columns[name] = list(prediction.classes)
        for place, word in enumerate(readout.classes):
            columns[f"{name}:{word}"] = values[:, place].tolist()
        return columns
    for suffix, output in _outputs(readout):
        columns[name + suffix] = values[:, output].tolist()
    return columns


def _outputs(readout: Readout) -> list[tuple[str, int]]:
    many = readout.num_outputs > 1
    return [(f":{output + 1}" if many else "", output) for output in range(readout.num_outputs)]
