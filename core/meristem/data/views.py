"""Other looks at a record, in training only."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from meristem.types import Tokens


class Views(ABC):
    """Gives a record another look each time that it is trained on.

    A plain value that travels to loader workers.
    """

    repeats: int = 1
    """Views of a record in one pack, each of which is trained on."""

    @abstractmethod
    def encode_view(self, payload: Any, rng: np.random.Generator) -> Tokens:
        """Encode one view of a payload, of as many tokens as the payload itself has: a pure function of its arguments.

        Args:
            rng: keyed by (seed, epoch, record); nothing else may be drawn from.

        Raises:
            DataError: as the tokenizer.
        """
