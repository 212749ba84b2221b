"""Clusters of records that share many k-mers: near-duplicates, found without comparing all pairs.

Of each payload a sketch is kept: the `SKETCH` smallest hashes of its k-mers (Broder 1997, bottom-s). Records
are taken in order. One that shares at least `threshold` of its sketch with a record met before joins its
cluster, and joins clusters that it links. It is remembered itself unless it shares `REDUNDANT` with one
that is. So two records that share `threshold + 1 - REDUNDANT` of their sketches are always in one cluster,
but for k-mers that are so common that no more than `POSTINGS` of their records are remembered.

A k-mer survives substitutions at identity p with probability p ** k: with k = 5, a quarter of them at 76 %.
Memory: a few hundred bytes for each hash of each record that is remembered, whatever the lengths.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from meristem.data.store import RecordStore
from meristem.data.tokenizer import column_bytes
from meristem.errors import ConfigError

SKETCH = 64
REDUNDANT = 0.8
POSTINGS = 100
PIECE_BYTES = 1 << 21
"""Payload bytes whose k-mers are hashed and sorted at once."""

_UPPER = np.arange(256, dtype=np.uint8)
_UPPER[ord("a") : ord("z") + 1] -= 32


def similarity_clusters(store: RecordStore, k: int, threshold: float) -> np.ndarray:
    """`[N]` cluster of each record, numbered from 0 in order of first records.

    Args:
        store: of records whose payloads are text or bytes; letters of both cases are alike.
        k: length of a k-mer in bytes: 5 for proteins, 15 or more for DNA.
        threshold: share of the sketch that joins two records, in (0, 1].

    Raises:
        ConfigError: `k` or `threshold` is out of range.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be in (0, 1]; got {threshold}")
    parents = np.arange(len(store))
    postings: dict[int, list[int]] = {}

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = int(parents[i])
        return i

    for row, sketch in enumerate(_sketches(store, k)):
        shared = Counter[int]()
        for value in sketch:
            shared.update(postings.get(value, ()))
        is_new = True
        for other, count in shared.items():
            if count >= threshold * len(sketch):
                one, two = root(other), root(row)
                parents[max(one, two)] = min(one, two)
                is_new &= count < REDUNDANT * len(sketch)
        if is_new:
            for value in sketch:
                known = postings.setdefault(value, [])
                if len(known) < POSTINGS:
                    known.append(row)
    roots = np.array([root(i) for i in range(len(store))], np.int64)
    return np.unique(roots, return_inverse=True)[1]


def _sketches(store: RecordStore, k: int) -> Iterator[list[int]]:
    """The sketch of each record in order, never empty: a payload without a k-mer is hashed whole."""
    payloads = store.column("payload")
    for chunk in payloads.chunks:
        text, bounds = column_bytes(chunk)
        first = 0
        while first < len(chunk):
            # as many whole payloads as fit, at least one
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + PIECE_BYTES, side="right")) - 1)
            yield from _sketch(text[bounds[first] : bounds[last]], bounds[first : last + 1] - bounds[first], k)
            first = last


def _sketch(text: np.ndarray, bounds: np.ndarray, k: int) -> Iterator[list[int]]:
    rows, hashes = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    for start in range(0, max(1, len(text) - k + 1), PIECE_BYTES):  # more than one for a long payload alone
        piece = _UPPER[text[start : start + PIECE_BYTES + k - 1]]
        begins = start + np.arange(len(piece) - k + 1)
        row = np.searchsorted(bounds, begins, side="right") - 1
        is_whole = begins + k <= bounds[row + 1]
        rows = np.concatenate([rows, row[is_whole]])
        hashes = np.concatenate([hashes, _hash_kmers(piece, k)[is_whole]])
        rows, hashes = _bottom(rows, hashes)
    edges = np.searchsorted(rows, np.arange(len(bounds)))
    for i, (start, stop) in enumerate(pairwise(edges.tolist())):
        if start < stop:
            yield hashes[start:stop].tolist()
        else:  # shorter than k; the sign keeps it apart from hashes of k-mers
            yield [-1 - int.from_bytes(_UPPER[text[bounds[i] : bounds[i + 1]]].tobytes(), "little")]


def _bottom(rows: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `SKETCH` smallest distinct hashes of each row, by row and size."""
    order = np.lexsort([hashes, rows])
    rows, hashes = rows[order], hashes[order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
    rows, hashes = rows[is_first], hashes[is_first]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < SKETCH], hashes[rank < SKETCH]


def _hash_kmers(text: np.ndarray, k: int) -> np.ndarray:
    """A 64-bit hash of each k-mer: a polynomial, then the mixing steps of SplitMix64 (Steele et al. 2014)."""
    count = max(0, len(text) - k + 1)
    hashes = np.zeros(count, np.uint64)
    for j in range(k):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + text[j : j + count]
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
