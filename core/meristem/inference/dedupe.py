"""Equal sequences are computed once, within a bounded window."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from meristem.inference.encoding import sides_of
from meristem.types import TokenColumn

WINDOW_SEQUENCES = 1 << 18
"""Distinct sequences that are remembered, the latest: about 60 MB, whatever the size of the input."""


@dataclass(frozen=True)
class Sources:
    """Where the vector of each record of a chunk comes from.

    Attributes:
        parts: `[N]` part that holds it.
        rows: `[N]` its row there.
        new_rows: rows of the chunk that have to be computed, first occurrences in order.
    """

    parts: np.ndarray
    rows: np.ndarray
    new_rows: np.ndarray


class Seen:
    """Remembers where the vector of a sequence was first written.

    Args:
        is_across_parts: whether vectors of earlier parts are used again.
    """

    def __init__(self, is_across_parts: bool = True):
        self._places: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._is_across_parts = is_across_parts

    def look_up(self, part: int, column: TokenColumn) -> Sources:
        """Look up the sequences of chunk `part` and remember the new ones."""
        if not self._is_across_parts:
            self._places.clear()
        parts, rows = np.empty(len(column), np.int64), np.empty(len(column), np.int64)
        data = [
            (values.tobytes(), values.itemsize * values[:1].size, side.offsets.tolist())
            for side in sides_of(column)
            for values in (side.ids, side.features, side.positions, side.token_types)
            if values is not None
        ]
        for row in range(len(column)):
            # 128 bits: no two sequences will ever share them
            digest = hashlib.blake2b(digest_size=16)
            for text, width, offsets in data:
                start, stop = offsets[row], offsets[row + 1]
                digest.update((stop - start).to_bytes(8, "little"))  # or two sides might share their symbols otherwise
                digest.update(text[start * width : stop * width])
            place = self._places.setdefault(digest.digest(), (part, row))
            parts[row], rows[row] = place
            if len(self._places) > WINDOW_SEQUENCES:
                self._places.popitem(last=False)
        is_new = (parts == part) & (rows == np.arange(len(column)))
        return Sources(parts, rows, np.flatnonzero(is_new))
