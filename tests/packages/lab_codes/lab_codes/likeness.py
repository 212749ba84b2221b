"""How alike the rows of a code are to a model: an array a record, and a figure of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from meristem.data.pack import pack_column
from meristem.figures.canvas import new_figure
from meristem.model.outputs import Wanted
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import NoOptions, Scorer
from meristem.types import TokenColumn


def score(running: RunningModel, column: TokenColumn, options: NoOptions) -> Iterator[np.ndarray]:
    """`[n, n]` cosines between the rows of each record, special ones included."""
    for row in range(len(column)):
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(running.model.device)
            rows = F.normalize(running.model(batch, Wanted()).hidden.final[: batch.layout.num_tokens].float(), dim=1)
        running.advance(batch.layout.num_tokens)
        yield (rows @ rows.T).cpu().numpy()


def draw(values: np.ndarray, running: RunningModel, column: TokenColumn) -> Any:
    """A figure of one array."""
    figure = new_figure(4, 4)
    figure.add_subplot().imshow(values, vmin=-1, vmax=1)
    return figure


LIKENESS = Scorer(
    help="how alike the rows of a code are: an array [n, n] a record",
    describe=lambda running, options: "cosines between rows",
    score=score,
    draw=draw,
)
