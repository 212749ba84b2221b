"""Weighted nearest neighbours by cosine, as DINO is measured (Caron et al. 2021): nothing is fitted."""

import numpy as np
import torch
from torch.nn import functional as F

from meristem.inference.engine import Advance

QUERIES = 1024
"""Queries that are compared with the bank at once."""


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, device: str = "cpu", advance: Advance | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors of a bank that are nearest to each query, the nearest first.

    Args:
        bank: `[N, D]`.
        queries: `[M, D]`; one that is in the bank finds itself.
        k: at most `N`.
        advance: called with the queries done.

    Returns:
        `[M, k]` cosines, and `[M, k]` rows of the bank.
    """
    unit_ND = F.normalize(torch.from_numpy(np.ascontiguousarray(bank, np.float32)).to(device), dim=1)
    cosines, rows = [], []
    for first in range(0, len(queries), QUERIES):
        block = np.ascontiguousarray(queries[first : first + QUERIES], np.float32)
        scores_MN = F.normalize(torch.from_numpy(block).to(device), dim=1) @ unit_ND.T
        values, places = scores_MN.topk(k, dim=1)
        cosines.append(values.cpu().numpy())
        rows.append(places.cpu().numpy())
        if advance is not None:
            advance(len(block), 0)
    if not rows:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return np.concatenate(cosines), np.concatenate(rows)


def vote_classes(cosines: np.ndarray, codes: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """`[M, C]` share of the votes of each class; a neighbour has `exp(cosine / temperature)` of them.

    Args:
        cosines: `[M, k]` of the neighbours.
        codes: `[M, k]` their classes.
    """
    weights = _weights(cosines, temperature)
    votes = np.zeros((len(cosines), num_classes))
    np.add.at(votes, (np.arange(len(cosines))[:, None], codes), weights)
    return votes / votes.sum(1, keepdims=True)


def vote_values(cosines: np.ndarray, values: np.ndarray, temperature: float) -> np.ndarray:
    """`[M]` mean of the neighbours' values, weighted as in `vote_classes`."""
    weights = _weights(cosines, temperature)
    return (weights * values).sum(1) / weights.sum(1)


def _weights(cosines: np.ndarray, temperature: float) -> np.ndarray:
    # from the nearest on, so that none is infinite and not all are 0
    return np.exp((cosines.astype(np.float64) - cosines[:, :1]) / temperature)
