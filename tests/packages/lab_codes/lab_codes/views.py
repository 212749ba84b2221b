"""Views of codes: an instrument may run backwards."""

from dataclasses import replace

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError
from meristem.types import Record


class Mirrored(Views):
    """All inputs of a record are read backwards, by chance in training and never in evaluation.

    Args:
        tokenizer: reads the views.
        rate: share of the records that are turned.
    """

    is_training_only = True

    def __init__(self, tokenizer: Tokenizer, rate: float = 0.5):
        if not 0 <= rate <= 1:
            raise ConfigError(f"data.views.rate must be in [0, 1]; got {rate}")
        self.rate = rate

    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        if rng is None or rng.random() >= self.rate:
            return (record,)
        return (replace(record, inputs={name: payload[::-1] for name, payload in record.inputs.items()}),)
