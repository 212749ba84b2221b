"""New figures, and how they are written to files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meristem.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, its sides in inches, that needs neither a window system nor global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG, replacing any file at `path` in one step."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def encode_figure(figure: "Figure") -> bytes:
    """Encode a figure as PNG and return the bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def save_array(colours: np.ndarray, path: Path) -> None:
    """Write `[H, W, 3]` uint8 of red, green and blue as a PNG, replacing any file at `path` in one step."""
    from matplotlib.image import imsave  # it takes a second, and most runs have nothing to show

    with replacing(path) as temporary:
        imsave(temporary, colours, format="png")
