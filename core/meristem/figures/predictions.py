"""Figures of predictions: confusion of classes, values against values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meristem.figures.canvas import new_figure, save_figure

MAX_NUMBERED = 20
"""Most classes for which each cell shows its count."""

MAX_TICKS = 40
"""Most names on an axis; of more classes, every n-th is named."""

MAX_LETTERS = 24
"""Longer names of classes are shortened."""


def draw_confusion(path: Path, confusions: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Draw confusion matrices, `[C, C]` counts by title, side by side: true classes in rows, coloured by row shares."""
    from matplotlib.colors import PowerNorm

    count = len(names)
    gamma = 1.0 if count <= MAX_NUMBERED else 0.5  # of many classes each error is a small share: let it be seen
    side = float(np.clip(0.3 * count, 4.2, 11))
    figure = new_figure((side + 1.2) * len(confusions), side + 0.8)
    panels = figure.subplots(1, len(confusions), squeeze=False)[0]
    ticks = range(0, count, -(-count // MAX_TICKS))
    short = [name if len(name) <= MAX_LETTERS else name[: MAX_LETTERS - 3] + "..." for name in names]
    size = 9 if count <= MAX_NUMBERED else 7
    for axes, (title, counts) in zip(panels, confusions.items()):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        shown = axes.imshow(shares, cmap="Blues", norm=PowerNorm(gamma, 0, 1), interpolation="nearest")
        labels = [short[tick] for tick in ticks]
        axes.set_xticks(list(ticks), labels, rotation=90, fontsize=size)
        axes.set_yticks(list(ticks), labels, fontsize=size)
        axes.set(title=title, xlabel="predicted", ylabel="true")
        if count <= MAX_NUMBERED:
            for row, column in zip(*np.nonzero(counts)):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(shown, ax=list(panels), label="share of the class", shrink=0.8)
    save_figure(figure, path)


def draw_values(path: Path, true: np.ndarray, predicted: Mapping[str, np.ndarray], name: str) -> None:
    """Draw predicted values, by title, against true ones (`[N]`), with the line on which they are equal."""
    figure = new_figure(4.6 * len(predicted), 4.4)
    panels = figure.subplots(1, len(predicted), squeeze=False)[0]
    for axes, (title, values) in zip(panels, predicted.items()):
        low, high = min(true.min(), values.min()), max(true.max(), values.max())
        axes.plot([low, high], [low, high], color="grey", linewidth=1)
        axes.plot(true, values, linestyle="", marker=".", markersize=4, alpha=0.6)
        axes.set(title=title, xlabel=f"{name}, true", ylabel=f"{name}, predicted")
        axes.grid(alpha=0.3)
    save_figure(figure, path)
