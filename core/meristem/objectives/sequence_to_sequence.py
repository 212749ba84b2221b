"""Sequence to sequence: a decoder writes what a column of the records says."""

import numpy as np

from meristem.data.parts import RunData
from meristem.errors import ConfigError
from meristem.objectives.text_column import TextColumn
from meristem.objectives.two_sided import TwoSided
from meristem.types import Record


class SequenceToSequence(TwoSided):
    """Write the text of a column, given the payload (Sutskever 2014; Vaswani 2017, arXiv 1706.03762, smooths by 0.1).

    The column is read by the tokenizer of the payload. A payload that is cropped no longer says what its target says:
    set `data.max_tokens_per_record` so that none is.

    Args:
        target_column: label column of the texts to write; every record needs one.
        max_target_tokens: longer targets end there, closing rows left out; null for what the model can place.
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    def __init__(
        self,
        target_column: str,
        max_target_tokens: int | None = None,
        start_id: int | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(start_id, label_smoothing)
        if max_target_tokens is not None and max_target_tokens < 1:
            raise ConfigError(f"objective.max_target_tokens must be 1 or more; got {max_target_tokens}")
        self.target_column, self.max_target_tokens = target_column, max_target_tokens
        self.label_columns = (target_column,)
        self._targets: TextColumn | None = None

    def bind(self, data: RunData) -> None:
        super().bind(data)
        self._targets = TextColumn.learn(self.target_column, data)

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        assert self._targets is not None, "bind comes first"
        return np.ceil(lengths + self._targets.mean_tokens).astype(lengths.dtype)

    def sides_of(
        self, record: Record, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._targets is not None, "bind comes first"
        target = self._targets.encode(self._targets.text_of(record), record.source)
        limits = [self.max_target_tokens, None if self.config is None else self.config.max_length]
        return payload, target[: min((limit for limit in limits if limit), default=None)]
