"""Clusters of records that share many k-mers: near-duplicates, found without comparing all pairs.

Of each payload a sketch is kept: the `SKETCH` smallest hashes of its k-mers (Broder 1997, bottom-s). Records
are taken in order. One that shares at least `threshold` of its sketch with a record met before joins its
cluster, and joins clusters that it links. It is remembered itself unless it shares `REDUNDANT` with one
that is. So two records that share `threshold + 1 - REDUNDANT` of their sketches are always in one cluster,
but for k-mers that are so common that no more than `POSTINGS` of their records are remembered.

A k-mer survives substitutions at identity p with probability p ** k: with k = 5, a quarter of them at 76 %.
Memory: about 4 kB for each record that is remembered, whatever its length.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from meristem.data.store import RecordStore
from meristem.data.store_writer import Progress
from meristem.data.tokenizer import column_bytes
from meristem.errors import require

SKETCH = 32
REDUNDANT = 0.8
POSTINGS = 100
PIECE_BYTES = 1 << 21
"""Payload bytes whose k-mers are hashed and sorted at once."""

HASH_BITS = np.uint64(40)
"""Of a k-mer; the other 24 bits of a key are the row within a piece, which is under `PIECE_BYTES` or alone."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """When two payloads of a domain are similar.

    Attributes:
        k: length of a k-mer in bytes of a canonical payload: short enough to survive the changes that similar payloads
            differ by, long enough to be rare in others.
        threshold: share of the sketch that makes two similar, in (0, 1].
    """

    k: int
    threshold: float = 0.25

    def __post_init__(self) -> None:
        require(self.k >= 1, "k must be at least 1", self.k)
        require(0 < self.threshold <= 1, "threshold must be in (0, 1]", self.threshold)


class Clusters:
    """Numbers from 0 on, each at first a cluster of its own."""

    def __init__(self, count: int):
        self._parents = np.arange(count)

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = int(self._parents[i])
        return i

    def join(self, one: int, other: int) -> None:
        """Make one cluster of those of two numbers."""
        least, most = sorted((self._root(one), self._root(other)))
        self._parents[most] = least

    def labels(self) -> np.ndarray:
        """`[N]` cluster of each number, numbered from 0 in order of their least numbers."""
        return np.unique([self._root(i) for i in range(len(self._parents))], return_inverse=True)[1]


def similarity_clusters(store: RecordStore, similarity: Similarity, progress: Progress | None = None) -> np.ndarray:
    """`[N]` cluster of each record, numbered from 0 in order of first records.

    Args:
        store: of records whose canonical payloads (`Reader.canonical`) are compared.
        progress: called with records done and records in all, now and then.
    """
    clusters = Clusters(len(store))
    postings: dict[int, int | list[int]] = {}  # most hashes have one record: a list each would double the memory

    for row, sketch in enumerate(_sketches(store, similarity.k)):
        met: list[int] = []
        for value in sketch:
            known = postings.get(value, [])
            met += known if isinstance(known, list) else [known]
        is_new, least = True, similarity.threshold * len(sketch)
        for other, count in Counter(met).items():
            if count >= least:
                clusters.join(other, row)
                is_new &= count < REDUNDANT * len(sketch)
        if is_new:
            for value in sketch:
                known = postings.setdefault(value, row)
                if isinstance(known, list):
                    if len(known) < POSTINGS:
                        known.append(row)
                elif known != row:
                    postings[value] = [known, row]
        if progress is not None and (row % 1000 == 999 or row == len(store) - 1):
            progress(row + 1, len(store))
    return clusters.labels()


def _sketches(store: RecordStore, k: int) -> Iterator[list[int]]:
    """The sketch of each record in order, never empty: a payload without a k-mer is hashed whole."""
    for payloads in store.canonical():
        text, bounds = column_bytes(pa.array(payloads, pa.large_binary()))
        first = 0
        while first < len(payloads):
            # as many whole payloads as fit, at least one, and no more than a key can number
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + PIECE_BYTES, side="right")) - 1)
            last = min(last, first + PIECE_BYTES)
            yield from _sketch(text[bounds[first] : bounds[last]], bounds[first : last + 1] - bounds[first], k)
            first = last


def _sketch(text: np.ndarray, bounds: np.ndarray, k: int) -> Iterator[list[int]]:
    keys = np.zeros(0, np.uint64)  # row and hash in one number: one fast sort
    for start in range(0, max(1, len(text) - k + 1), PIECE_BYTES):  # more than one for a long payload alone
        piece = text[start : start + PIECE_BYTES + k - 1]
        begins = start + np.arange(len(piece) - k + 1)
        row = np.searchsorted(bounds, begins, side="right") - 1
        is_whole = begins + k <= bounds[row + 1]
        found = (row.astype(np.uint64) << HASH_BITS) | _hash_kmers(piece, k)
        keys = np.sort(np.concatenate([keys, found[is_whole]]))  # np.unique is 60 times as slow here
        keys = keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]
        first_of_row = np.searchsorted(keys, np.arange(len(bounds), dtype=np.uint64) << HASH_BITS)
        counts = np.diff(first_of_row)
        rank = np.arange(len(keys)) - np.repeat(first_of_row[:-1], counts)
        keys = keys[rank < SKETCH]
    edges = np.concatenate([[0], np.cumsum(np.minimum(counts, SKETCH))]).tolist()
    hashes = keys & ((np.uint64(1) << HASH_BITS) - np.uint64(1))
    for i, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:
            yield hashes[start:stop].tolist()
        else:  # shorter than k; the sign keeps it apart from hashes of k-mers
            yield [-1 - int.from_bytes(text[bounds[i] : bounds[i + 1]].tobytes(), "little")]


def _hash_kmers(text: np.ndarray, k: int) -> np.ndarray:
    """A hash of `HASH_BITS` of each k-mer: a polynomial, then the mixing steps of SplitMix64 (Steele et al. 2014)."""
    count = max(0, len(text) - k + 1)
    hashes = np.zeros(count, np.uint64)
    for j in range(k):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + text[j : j + count]
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (hashes ^ (hashes >> np.uint64(31))) >> (np.uint64(64) - HASH_BITS)
