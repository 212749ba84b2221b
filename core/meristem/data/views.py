"""Other looks at a record, which training and evaluation see in its place."""

from abc import ABC, abstractmethod

import numpy as np

from meristem.types import Record


class Views(ABC):
    """Gives the records that are used in the place of a record.

    A plain value that travels to the processes that prepare packs.

    Attributes:
        num_views: records that training takes for each record, all of them in one pack; packs are planned by it.
        is_training_only: evaluation and verbs such as embed take each record as it is.
    """

    num_views: int = 1
    is_training_only: bool = False

    @abstractmethod
    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        """The views of a record: a pure function of its arguments.

        A view may have other payloads and other labels. Its payload may be anything that the tokenizer's
        `encode_values` takes, such as a decoded array, so that nothing is decoded twice; it should give about as
        many tokens as the record's own.

        Args:
            record: its payloads are those of the domain's reader, or, where a program hands sequences over, whatever
                of them `encode_values` takes.
            rng: keyed by (seed, epoch, record); nothing else may be drawn from. None in evaluation, and in verbs such
                as embed, which average what a model says of all views of a record; these are equally many for each.

        Raises:
            DataError: the payload cannot be read.
        """
