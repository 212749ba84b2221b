"""From token columns to what the heads of a fine-tuned model say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from meristem.errors import ConfigError
from meristem.inference.engine import Advance, TrunkRunner, check_finite, unheard, views_of
from meristem.model.heads import Readout
from meristem.model.outputs import HeadRequest, Wanted
from meristem.shapes import Float, Tensor
from meristem.types import TokenColumn


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one head says of the sequences of a column.

    Attributes:
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
    def predict(self, column: TokenColumn, advance: Advance = unheard) -> dict[str, Prediction]:
        """Predictions by the name of the label.

        Raises:
            NotFinite: names the first sequence whose prediction is not finite.
        """
        if column.views:
            is_per_token = not all(map(_is_pooled, self.readouts))
            views = [self.predict(view, advance) for view in views_of(column, is_per_token)]
            return {
                name: replace(first, values=np.mean([view[name].values for view in views], axis=0))
                for name, first in views[0].items()
            }
        token_lengths = column.payload_lengths
        found: dict[str, Prediction] = {}
        for readout in self.readouts:
            lengths = np.ones(len(column), np.int64) if _is_pooled(readout) else token_lengths
            values = np.empty((int(lengths.sum()), readout.num_outputs), np.float32)
            found[readout.name] = Prediction(readout, values, lengths)
        wanted = Wanted(dict.fromkeys(found, HeadRequest(rounds_alike=True)), num_first=0, is_source_only=True)
        ends = np.cumsum(token_lengths)
        for rows in self.trunk.run(column, wanted):
            for name, into in found.items():
                values = in_units(into.readout, rows.outputs.heads[name].float()).cpu().numpy()
                rows.place(values, into.values, None if _is_pooled(into.readout) else ends)
            advance(len(rows.records), int(token_lengths[list(rows.records)].sum()))
        for prediction in found.values():
            check_finite(prediction.values, np.cumsum(prediction.lengths))
        return found


def in_units(readout: Readout, outputs: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """Outputs of a head as probabilities of classes, or as values in the unit of the labels."""
    if readout.task == "classification":
        return outputs.softmax(-1)
    scale, shift = (torch.tensor(part, device=outputs.device) for part in (readout.std, readout.mean))
    return outputs * scale + shift


def _is_pooled(readout: Readout) -> bool:
    return readout.level == "record"


def table_columns(predictions: Mapping[str, Prediction], is_per_token: bool) -> dict[str, list[object]]:
    """Columns of a table of predictions: class and probabilities, or the value.

    In a table of records, what is said of tokens is one text for each record. Their classes are one character each
    where all names are, else words with spaces between.

    Args:
        is_per_token: one row a token, of the labels that tokens have; else one row a record.
    """
    columns: dict[str, list[object]] = {}
    for name, prediction in predictions.items():
        readout = prediction.readout
        if is_per_token and _is_pooled(readout):
            continue
        is_text = not (is_per_token or _is_pooled(readout))
        is_classes = readout.task == "classification"
        if is_classes and is_text:
            between = "" if all(len(word) == 1 for word in readout.classes) else " "
            names = iter(prediction.classes)
            columns[name] = [between.join(islice(names, length)) for length in prediction.lengths]
            continue
        if is_classes:
            columns[name] = list(prediction.classes)
            outputs = [f":{word}" for word in readout.classes]
        else:
            outputs = [f":{output + 1}" for output in range(readout.num_outputs)] if readout.num_outputs > 1 else [""]
        for output, suffix in enumerate(outputs):
            columns[name + suffix] = (
                [" ".join(f"{value:.6g}" for value in rows[:, output]) for rows in prediction.split()]
                if is_text
                else prediction.values[:, output].tolist()
            )
    return columns
