"""Sequence to sequence: a decoder writes one input of a record, given another."""

import numpy as np

from meristem.data.parts import Encoder
from meristem.errors import ConfigError
from meristem.objectives.two_sided import TwoSided

SOURCE, TARGET = "source", "target"


class SequenceToSequence(TwoSided):
    """Write the input `target`, given the input `source` (Sutskever 2014; Vaswani 2017, arXiv 1706.03762).

    A source that is cropped no longer says what its target says: set `data.max_tokens_per_record` so that none is.

    Args:
        max_target_tokens: longer targets end there, closing rows left out; null for what the model can place.
        start_id: symbol that the decoder reads first; null for the tokenizer's padding, or 0 where it has none.
        label_smoothing: share of each target's probability that is spread evenly over all symbols.
    """

    inputs = (SOURCE, TARGET)

    def __init__(self, max_target_tokens: int | None = None, start_id: int | None = None, label_smoothing: float = 0.0):
        super().__init__(start_id, label_smoothing)
        if max_target_tokens is not None and max_target_tokens < 1:
            raise ConfigError(f"objective.max_target_tokens must be 1 or more; got {max_target_tokens}")
        self.max_target_tokens = max_target_tokens

    def sides_of(
        self, encode: Encoder, payload: np.ndarray, closing: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        target = encode(TARGET)
        limits = [self.max_target_tokens, None if self.config is None else self.config.max_length]
        return payload, target.ids[target.frame[0] :][: min((limit for limit in limits if limit), default=None)]
