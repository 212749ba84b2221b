"""Where a model of patches looks: attention over the grid of a picture, as arrays and as a figure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.errors import ConfigError
from meristem.figures.canvas import new_figure
from meristem.model.outputs import Wanted
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer, option
from meristem.shapes import Int, Tensor
from meristem.types import Hidden, TokenColumn

MAX_HEADS = 12
"""Heads that a figure shows, the first ones."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Which attention is wanted.

    Attributes:
        layer: the block whose attention it is: 0 is the first, -1 the last.
        query: whose attention it is: the class row's or the mean of the patches'; None for the class row, and the mean
            where there is none.
    """

    layer: int = option(-1, "the block, 0 is the first; the last by default")
    query: Literal["class", "mean"] | None = option(
        None, "who looks, the class row or the mean of the patches; the class row by default where there is one"
    )


def attention_maps(running: RunningModel, column: TokenColumn, options: AttentionOptions) -> Iterator[np.ndarray]:
    """One array `[H, rows, columns]` a picture, in order, float32; nan where the grid has no patch.

    A map is part of a distribution: what it lacks to 1 goes to special rows (class token, registers). One picture at
    a time: the weights of a layer take `4 * H * n * n` bytes.

    Raises:
        ConfigError: as `describe`, or the class row is asked for and there is none.
    """
    describe(running, options)
    layer = options.layer % running.model.config.num_layers
    for row in range(len(column)):
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(running.model.device)
            hidden = running.model(batch, Wanted(attentions=(layer,))).hidden
            [maps] = maps_of(hidden, batch.positions, layer, options.query)
        running.advance(batch.layout.num_tokens)
        yield maps


def describe(running: RunningModel, options: AttentionOptions) -> str:
    """What the values are.

    Raises:
        ConfigError: the model is not one of patches with one stack, or has no such block.
    """
    config, tokenizer = running.model.config, running.tokenizer
    if not tokenizer.num_features or tokenizer.num_axes != 2:
        raise ConfigError("attention over a grid needs a model of patches with rows and columns; this one has none")
    if config.num_decoder_layers:
        raise ConfigError("attention over a grid needs a model of one stack; this one is an encoder-decoder")
    if not -config.num_layers <= options.layer < config.num_layers:
        last = config.num_layers - 1
        raise ConfigError(f"layer of attention must be in 0..{last} or -{last + 1}..-1; got {options.layer}")
    return f"attention of block {options.layer % config.num_layers} over patches, [heads, rows, columns]"


def maps_of(
    hidden: Hidden, positions: Int[Tensor, "T 2"], layer: int, query: Literal["class", "mean"] | None = None
) -> list[np.ndarray]:
    """The maps of each sequence of a pack whose attentions were kept.

    Args:
        positions: of the pack: row and column of each patch, -1 for special rows.
        layer: counted from 0, among those kept.
        query: as in `AttentionOptions`.
    """
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


def draw_attention(maps: np.ndarray, image: np.ndarray | None = None) -> Any:
    """A figure of the picture, the mean of the heads over it, and each head over it.

    Args:
        maps: `[H, rows, columns]`.
        image: `[height, width, C]` values between 0 and 1, as the model saw it; None for maps alone.
    """
    heads = maps[:MAX_HEADS]
    panels: list[tuple[str, np.ndarray | None]] = [] if image is None else [("image", None)]
    panels += [("mean of the heads", maps.mean(0)), *((f"head {head}", values) for head, values in enumerate(heads))]
    num_columns = min(len(panels), 5)
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(2.2 * num_columns, 2.4 * num_rows + 0.3)
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
    return figure


ATTENTION = Scorer(
    help="where a model of patches looks: an array [heads, rows, columns] a picture",
    options=AttentionOptions,
    describe=describe,
    score=attention_maps,
    draw=lambda maps, running, column: draw_attention(
        maps, running.tokenizer.decode(running.tokenizer.tokens_at(column, 0))
    ),
)
