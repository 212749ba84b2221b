"""Votes of nearest neighbours by cosine similarity, as DINO is evaluated (Caron 2021, arXiv 2104.14294)."""

import numpy as np
import torch
from torch.nn import functional as F

QUERIES = 1024
"""Number of queries that are compared with the bank at once."""


def nearest(bank: np.ndarray, queries: np.ndarray, k: int, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors of the bank that are nearest to each query, the nearest first.

    Args:
        bank: `[N, D]`.
        queries: `[M, D]`, one or more; a query that is in the bank finds itself.
        k: at most `N`.

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
    return np.concatenate(cosines), np.concatenate(rows)


def vote_classes(cosines: np.ndarray, codes: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """`[M, C]` each class's share of the votes, where a neighbour has the weight `exp(cosine / temperature)`.

    Args:
        cosines: `[M, k]` similarities of the neighbours.
        codes: `[M, k]` their classes.
    """
    weights = _weights(cosines, temperature)
    votes = np.zeros((len(cosines), num_classes))
    np.add.at(votes, (np.arange(len(cosines))[:, None], codes), weights)
    return votes / votes.sum(1, keepdims=True)


def vote_values(cosines: np.ndarray, values: np.ndarray, temperature: float) -> np.ndarray:
    """`[M]` mean of the values of the neighbours, weighted as in `vote_classes`."""
    weights = _weights(cosines, temperature)
    return (weights * values).sum(1) / weights.sum(1)


def _weights(cosines: np.ndarray, temperature: float) -> np.ndarray:
    # relative to the nearest neighbour, so that no weight is infinite and not all are 0
    return np.exp((cosines.astype(np.float64) - cosines[:, :1]) / temperature)
