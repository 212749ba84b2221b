"""Which rows of sequences are special, as tokenizers, pools and writers need to know it."""

import numpy as np

from meristem.types import Layout


def frame_of(offsets: np.ndarray, num_special: tuple[int, int]) -> np.ndarray:
    """Which rows of a column are special, `[sum of n]`: `num_special` before and behind each payload."""
    before, behind = num_special
    is_special = np.zeros(int(offsets[-1]), bool)
    for i in range(before):
        is_special[offsets[:-1] + i] = True
    for i in range(behind):
        is_special[offsets[1:] - 1 - i] = True
    return is_special


def payload_parts(layout: Layout) -> list[slice | np.ndarray]:
    """Rows of each sequence that are not special, counted from its first row: a slice, or an index with gaps."""
    is_payload = np.ones(layout.num_tokens, bool)
    is_payload[list(layout.special_rows)] = False
    rows = np.flatnonzero(is_payload)
    bounds = np.concatenate([[0], np.cumsum(layout.lengths)]).astype(np.int64)
    stops = np.searchsorted(rows, bounds).tolist()
    parts: list[slice | np.ndarray] = []
    for first, last, start in zip(stops, stops[1:], bounds.tolist()):
        own = rows[first:last] - start
        if len(own) and own[-1] - own[0] >= len(own):
            parts.append(own)
        else:
            parts.append(slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0))
    return parts
