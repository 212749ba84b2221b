"""Where a model of patches looks: attention over the grid of an image, as arrays and as a picture."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.errors import ConfigError
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.shapes import Int, Tensor
from meristem.types import Hidden, TokenColumn

QUERIES = ("class", "mean")
"""Who looks: the first row, where it is no patch; or the patches, on average."""

MAX_HEADS = 12
"""Heads that a picture shows, the first ones."""


def attention_maps(
    model: Model, column: TokenColumn, layer: int = -1, query: str | None = None
) -> Iterator[np.ndarray]:
    """One array `[H, rows, columns]` an image, in order, float32; nan where the grid has no patch.

    A map is part of a distribution: what it lacks to 1 goes to special rows (class token, registers). One image at
    a time: the weights of a layer take `4 * H * n * n` bytes.

    Args:
        model: of patches, in evaluation mode.
        layer: block whose attention is wanted: 0 is the first, -1 the last.
        query: one of `QUERIES`; None for the class row, and the mean where there is none.

    Raises:
        ConfigError: no model of patches, or no such block or class row.
    """
    num_layers = model.config.num_layers
    if not -num_layers <= layer < num_layers:
        raise ConfigError(f"layer of attention must be in 0..{num_layers - 1} or -{num_layers}..-1; got {layer}")
    if column.features is None or column.positions is None or column.positions.shape[1] != 2:
        raise ConfigError("attention over a grid needs a model of patches with rows and columns; this one has none")
    if model.config.num_decoder_layers:
        raise ConfigError("attention over a grid needs a model of one stack; this one is an encoder-decoder")
    layer %= num_layers
    for row in range(len(column)):
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(model.device)
            hidden = model(batch, Wanted(attentions=(layer,))).hidden
            [maps] = maps_of(hidden, batch.positions, layer, query)
        yield maps


def maps_of(hidden: Hidden, positions: Int[Tensor, "T 2"], layer: int, query: str | None = None) -> list[np.ndarray]:
    """The maps of each sequence of a pack whose attentions were kept; arguments as those of `attention_maps`.

    Args:
        positions: of the pack: row and column of each patch, -1 for special rows.
        layer: counted from 0, among those kept.
    """
    if query is not None and query not in QUERIES:
        raise ConfigError(f"query must be one of {', '.join(QUERIES)}; got {query!r}")
    found = []
    layout = hidden.layout
    for weights_Hnn, start, length in zip(hidden.attentions[layer], layout.starts, layout.lengths):
        places = positions[start : start + length].cpu().numpy()
        is_patch = places.min(1) >= 0
        who = query or ("mean" if is_patch[0] else "class")
        if who == "class" and is_patch[0]:
            raise ConfigError("query class needs a class row before the patches and this model has none; use mean")
        maps_Hnn = weights_Hnn.float().cpu().numpy()
        rows_Hn = maps_Hnn[:, 0] if who == "class" else maps_Hnn[:, is_patch].mean(1)
        grid = places[is_patch] - places[is_patch].min(0)
        values = np.full((len(rows_Hn), *(grid.max(0) + 1)), np.nan, np.float32)
        values[:, grid[:, 0], grid[:, 1]] = rows_Hn[:, is_patch]
        found.append(values)
    return found


def draw_attention(path: Path, maps: np.ndarray, image: np.ndarray | None = None, title: str = "") -> None:
    """Draw the image, the mean of the heads over it, and each head over it.

    Args:
        path: a PNG.
        maps: `[H, rows, columns]`.
        image: `[height, width, C]` values between 0 and 1, as the model saw it; None for maps alone.
    """
    # the object-oriented interface: no window system, no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = maps[:MAX_HEADS]
    panels: list[tuple[str, np.ndarray | None]] = [] if image is None else [("image", None)]
    panels += [("mean of the heads", maps.mean(0)), *((f"head {head}", values) for head, values in enumerate(heads))]
    num_columns = min(len(panels), 5)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(2.2 * num_columns, 2.4 * num_rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    extent = (0, maps.shape[2], maps.shape[1], 0)
    if image is not None:
        shown = np.clip(image if image.shape[2] == 3 else np.repeat(image.mean(2, keepdims=True), 3, 2), 0, 1)
    for axis, (name, values) in zip(axes, panels):
        if image is not None:
            axis.imshow(shown, extent=extent)
        if values is not None:
            axis.imshow(values, cmap="inferno", alpha=1.0 if image is None else 0.6, extent=extent)
        axis.set_title(name, fontsize=8)
    for axis in axes:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=120)
