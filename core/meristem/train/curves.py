"""Draws `metrics.csv`."""

import csv
import math
from pathlib import Path

from meristem.figures.canvas import new_figure, save_figure


def draw_curves(metrics: Path, out: Path) -> None:
    """Draw the loss of training and validation, and each other figure of the validation, over the steps, as a PNG."""
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    validated = [name for name in rows[0] if name.startswith("val/") and name != "val/loss"]
    validated = [name for name in validated if _curve(rows, name)[0]][:5]
    num_columns = min(3, 1 + len(validated))
    num_rows = math.ceil((1 + len(validated)) / num_columns)
    figure = new_figure(5 * num_columns, 3.6 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    axes[0].plot(*_curve(rows, "loss"), linewidth=1, label="training", alpha=0.7)
    if (validation := _curve(rows, "val/loss"))[0]:
        axes[0].plot(*validation, marker=".", label="validation")
    axes[0].legend()
    axes[0].set_ylabel("loss (nats)")
    for axis, name in zip(axes[1:], validated):
        axis.plot(*_curve(rows, name), marker=".")
        axis.set_ylabel(name.removeprefix("val/"))
    for axis in axes[: 1 + len(validated)]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[1 + len(validated) :]:
        axis.remove()
    save_figure(figure, out)


def _curve(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]
