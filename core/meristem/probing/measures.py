"""Figures that evaluate predictions, each computed from its definition."""

import numpy as np


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """`[C, C]` number of records by true class (row) and predicted class (column)."""
    return np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_figures(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 over classes that occur, and Matthews correlation (Gorodkin 2004) of a confusion matrix."""
    counts = confusion.astype(np.float64)
    right, true, given, total = np.diag(counts), counts.sum(1), counts.sum(0), counts.sum()
    occurs = true + given > 0
    covariance = right.sum() * total - true @ given
    spread = np.sqrt(total**2 - given @ given) * np.sqrt(total**2 - true @ true)
    return {
        "accuracy": float(right.sum() / total),
        "macro_f1": float((2 * right[occurs] / (true + given)[occurs]).mean()),
        "mcc": float(covariance / spread) if spread else 0.0,
    }


def top_k_accuracy(scores: np.ndarray, true: np.ndarray, k: int) -> float:
    """Share of records whose true class is among the `k` classes with the highest scores.

    A class with a score of 0 is never among them: no neighbour voted for it.

    Args:
        scores: `[N, C]` 0 or more.
        true: `[N]` indices of classes; one of `C` or more counts as wrong.
    """
    found = 0
    for row, code in zip(scores, true):
        if code < len(row) and row[code] > 0:
            is_before = (row > row[code]) | ((row == row[code]) & (np.arange(len(row)) < code))
            found += int(is_before.sum() < k)
    return found / len(true)


def value_figures(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Spearman's correlation, R2, and the root mean squared error; None where all values are equal."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(true), _ranks(predicted)))
    spread = np.sqrt((a @ a) * (b @ b))
    squares = float(((true - true.mean()) ** 2).sum())
    errors = float(((true - predicted) ** 2).sum())
    return {
        "spearman": float(a @ b / spread) if spread else None,
        "r2": 1 - errors / squares if squares else None,
        "rmse": float(np.sqrt(errors / len(true))),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
