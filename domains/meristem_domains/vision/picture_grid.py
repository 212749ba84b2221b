"""Several pictures in one image, in rows and columns."""

from collections.abc import Sequence

import numpy as np

LEAST_PX = 96
"""Small pictures are enlarged by a whole factor, to at most this longer side."""

GAP_PX = 4
"""Width of the white gaps between pictures."""


def picture_grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """`[H, W, 3]` uint8: rows of pictures on a white background.

    Args:
        rows: pictures `[H, W, C]` of any sizes, with values that are clipped to 0..1. One or two channels are shown
            in grey, of more than three the first three.
    """
    cells = [[_shown(picture) for picture in row] for row in rows]
    heights = [max(cell.shape[0] for cell in row) for row in cells]
    num_columns = max(map(len, cells))
    widths = [max(row[at].shape[1] for row in cells if at < len(row)) for at in range(num_columns)]
    sheet = np.full(
        (sum(heights) + GAP_PX * (len(rows) + 1), sum(widths) + GAP_PX * (num_columns + 1), 3), 255, np.uint8
    )
    top = GAP_PX
    for row, height in zip(cells, heights):
        left = GAP_PX
        for cell, width in zip(row, widths):
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
            left += width + GAP_PX
        top += height + GAP_PX
    return sheet


def _shown(picture: np.ndarray) -> np.ndarray:
    colours = picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].repeat(3, axis=2)
    values = np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)
    factor = max(1, LEAST_PX // max(values.shape[:2]))
    return values.repeat(factor, axis=0).repeat(factor, axis=1)
