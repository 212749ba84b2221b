"""Probes on vectors in memory: what each method says of the test's records."""

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
"""Neighbours that vote, where there are as many."""


class Watch(Protocol):
    """Is told how the work goes."""

    def embedding(self, title: str) -> AbstractContextManager[Report]:
        """Vectors of a set of files are made."""

    def reused(self, records: int) -> None:
        """Vectors of so many records were made by an earlier call."""

    def fitting(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Up to so many penalties are tried."""


class Unwatched:
    """Tells nobody."""

    def embedding(self, title: str) -> AbstractContextManager[Report]:
        return nullcontext(Silent())

    def reused(self, records: int) -> None: ...

    def fitting(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Fit:
    """Vectors of training and validation, and of the test."""

    options: ProbeOptions
    device: str
    watch: Watch
    vectors: np.ndarray
    is_validation: np.ndarray
    test_vectors: np.ndarray

    def class_scores(self, method: str, codes: np.ndarray, num_classes: int) -> tuple[np.ndarray, dict[str, Any]]:
        """`[M, C]` probabilities of the test's records, and how they came to be."""
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
        """`[M]` predictions for the test's records, and how they came to be."""
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
