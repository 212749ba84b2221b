"""Sequences longer than positions allow: overlapping windows, averaged where they overlap.

A window is a stretch of the payload with the special rows around it, as long as positions allow. All windows
of a sequence are equally long and evenly spread, and neighbours share a quarter of a window or more, so a token
near the border of one window stands further inside another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meristem.errors import ConfigError
from meristem.shapes import Float, Tensor
from meristem.types import TokenColumn, Tokens

OVERLAP_FRAC = 0.25
"""Share of a window that it has in common with the next one, at least."""


@dataclass(frozen=True)
class Windows:
    """The windows of one sequence.

    Attributes:
        column: one row a window, special rows included.
        rows: `[W, w]` the rows of the sequence that each window holds.
    """

    column: TokenColumn
    rows: np.ndarray

    def mean(self, rows: Sequence[Float[Tensor, "w D"]]) -> Float[Tensor, "n D"]:
        """The fp32 rows of the whole sequence from those of each window; a special row is averaged over all windows."""
        num_tokens = int(self.rows.max()) + 1
        sum_nD = torch.zeros(num_tokens, rows[0].shape[1], device=rows[0].device)
        count_n1 = torch.zeros(num_tokens, 1, device=rows[0].device)
        # sums depend on their order
        for places, own in zip(torch.from_numpy(self.rows).to(rows[0].device), rows, strict=True):
            sum_nD[places] += own.float()
            count_n1[places] += 1
        return sum_nD / count_n1


def cut(tokens: Tokens, max_length: int) -> Windows:
    """Cut a sequence of symbols into windows.

    Args:
        tokens: more than `max_length`, special ones included.

    Raises:
        ConfigError: positions allow nothing beside the special rows.
    """
    before, behind = tokens.frame
    width = max_length - before - behind
    if width < 1:
        raise ConfigError(f"positions must allow more than {before + behind} special rows; got {max_length}")
    num_payload = len(tokens) - before - behind
    step = max(1, width - int(np.ceil(width * OVERLAP_FRAC)))
    count = 1 + -(-(num_payload - width) // step)
    starts = np.round(np.linspace(0, num_payload - width, count)).astype(np.int64)
    rows = np.empty((count, max_length), np.int64)
    rows[:, :before], rows[:, max_length - behind :] = np.arange(before), np.arange(len(tokens) - behind, len(tokens))
    rows[:, before : before + width] = before + starts[:, None] + np.arange(width)
    column = TokenColumn(
        ids=tokens.ids[rows.reshape(-1)],
        offsets=np.arange(count + 1, dtype=np.int64) * max_length,
        is_special=None if tokens.is_special is None else tokens.is_special[rows.reshape(-1)],
    )
    return Windows(column, rows)
