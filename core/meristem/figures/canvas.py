"""An empty figure, and a figure written to a file."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from meristem.files import replacing


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure without axes, which needs no window system and changes no global state.

    Args:
        width, height: in inches.
    """
    # imported where a figure is drawn: it takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, target: Path | BinaryIO) -> None:
    """Write a figure as a PNG, into a stream or a file; a file of that name is replaced as a whole."""
    with replacing(target) if isinstance(target, Path) else nullcontext(target) as opened:
        figure.savefig(opened, format="png", dpi=120)
