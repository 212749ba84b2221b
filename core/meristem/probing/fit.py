"""Probes on vectors in memory: the predictions of each method for the test records."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from meristem.inference.run import Report, Silent
from meristem.probing.linear import L2_CLASSES, probe_classes, probe_values
from meristem.probing.neighbours import nearest, vote_classes, vote_values
from meristem.probing.options import ProbeOptions

DEFAULT_K = 20
"""Number of neighbours that vote, unless there are fewer training records."""


class Watch(Protocol):
    """Receives the progress of a probe."""

    def embedding(self, title: str) -> AbstractContextManager[Report]:
        """Called when the records of a set of files are embedded; gives the receiver of that progress."""
        return nullcontext(Silent())

    def reused(self, records: int) -> None:
        """Called when the vectors of this many records were found in the cache."""
        return

    def fitting(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Called when at most `total` penalties will be tried; the function it gives counts them."""
        return nullcontext(lambda count: None)


class Unwatched(Watch):
    """Ignores the progress."""


@dataclass(frozen=True)
class Fit:
    """The vectors that probes are fitted to, and those of the test records.

    Attributes:
        vectors: `[N, D]` of training and validation records.
        is_validation: `[N]` which of them are validation records.
        test_vectors: `[M, D]`.
    """

    options: ProbeOptions
    device: str
    watch: Watch
    vectors: np.ndarray
    is_validation: np.ndarray
    test_vectors: np.ndarray

    def class_scores(self, method: str, codes: np.ndarray, num_classes: int) -> tuple[np.ndarray, dict[str, Any]]:
        """`[M, C]` class probabilities of the test records, and the settings that were used."""
        if method == "knn":
            cosines, rows, facts = self._neighbours()
            return vote_classes(cosines, codes[rows], num_classes, self.options.temperature), facts
        with self.watch.fitting(len(L2_CLASSES)) as advance:
            probe = probe_classes(
                self.vectors, codes, num_classes, self.is_validation, device=self.device, advance=advance
            )
        logits = probe.outputs(self.test_vectors)
        scores = np.exp(logits - logits.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True), _l2_facts(probe.l2, probe.losses)

    def values(self, method: str, values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """`[M]` predictions for the test records, and the settings that were used."""
        if method == "knn":
            cosines, rows, facts = self._neighbours()
            return vote_values(cosines, values[rows], self.options.temperature), facts
        probe = probe_values(self.vectors, values, self.is_validation, device=self.device)
        return probe.outputs(self.test_vectors)[:, 0], _l2_facts(probe.l2, probe.losses)

    def _neighbours(self) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        k = self.options.k or min(DEFAULT_K, len(self.vectors))
        cosines, rows = nearest(self.vectors, self.test_vectors, k, self.device)
        return cosines, rows, {"k": k, "temperature": self.options.temperature}


def _l2_facts(l2: float, losses: dict[float, float]) -> dict[str, Any]:
    return {"l2": l2, "validation_losses": {f"{value:g}": loss for value, loss in losses.items()}}
