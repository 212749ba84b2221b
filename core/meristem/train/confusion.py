"""Draws which classes were taken for which."""

from collections.abc import Sequence
from pathlib import Path

from meristem.files import replacing
from meristem.shapes import Int, Tensor

MAX_WRITTEN = 25
"""Classes up to which counts and names are legible."""


def draw_confusion(counts: Int[Tensor, "C C"], classes: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix: colours are shares of each row.

    Args:
        counts: how many of each class (rows) were taken for each (columns).
        classes: their names.
        out: a PNG; replaced as a whole.
    """
    # the object-oriented interface: no window system, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(classes)
    is_written = num <= MAX_WRITTEN
    side = min(12.0, 2.5 + 0.45 * num)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    if is_written:
        axis.set_xticks(range(num), classes, rotation=90)
        axis.set_yticks(range(num), classes)
        for row in range(num):
            for column in range(num):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = f"{int(counts[row, column])}"
                    axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
