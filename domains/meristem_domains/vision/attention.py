"""The scorer `attention`: attention maps of a model of patches over the grid of a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from meristem.data.pack import pack_column
from meristem.errors import ConfigError, require
from meristem.figures.canvas import new_figure
from meristem.model.outputs import Wanted
from meristem.scoring.running import RunningModel
from meristem.scoring.scorer import Scorer, option
from meristem.shapes import Float, Int, Tensor
from meristem.types import TokenColumn

MAX_HEADS = 12
"""A figure shows this many heads, the first ones."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Which attention weights are returned.

    Attributes:
        layer: index of the block: 0 is the first, -1 the last.
        query: the class row, or the mean over the patches; None for the class row where the model has one, else mean.
    """

    layer: int = option(-1, "the block, 0 is the first; the last by default")
    query: Literal["class", "mean"] | None = option(
        None, "who looks, the class row or the mean of the patches; the class row by default where there is one"
    )


def attention_maps(running: RunningModel, column: TokenColumn, options: AttentionOptions) -> Iterator[np.ndarray]:
    """For each picture in turn, an array `[H, rows, columns]`, float32; nan where the grid has no patch.

    A map sums to less than 1: the rest of the attention goes to special rows (class token, registers). Pictures run one
    at a time, since the weights of a layer take `4 * H * n * n` bytes.

    Raises:
        ConfigError: as for `describe`; or the query is the class row, and the model has none.
    """
    describe(running, options)
    layer = options.layer % running.model.config.num_layers
    for row in range(len(column)):
        with torch.inference_mode():
            batch = pack_column(column, np.array([row]), [row]).to(running.model.device)
            [weights_Hnn] = running.model(batch, Wanted(attentions=(layer,))).hidden.attentions[layer]
        running.advance(batch.layout.num_tokens)
        yield map_of(weights_Hnn, batch.positions[: len(weights_Hnn[0])], options.query)


def describe(running: RunningModel, options: AttentionOptions) -> str:
    """What the values of `attention_maps` mean, in words.

    Raises:
        ConfigError: the model does not read patches, is an encoder-decoder, or has no such block.
    """
    config, tokenizer = running.model.config, running.tokenizer
    if not tokenizer.num_features or tokenizer.num_axes != 2:
        raise ConfigError("attention over a grid needs a model of patches with rows and columns; this one has none")
    if config.num_decoder_layers:
        raise ConfigError("attention over a grid needs a model of one stack; this one is an encoder-decoder")
    depth = config.num_layers
    rule = f"layer of attention must be in 0..{depth - 1} or -{depth}..-1"
    require(-depth <= options.layer < depth, rule, options.layer)
    return f"attention of block {options.layer % config.num_layers} over patches, [heads, rows, columns]"


def map_of(
    weights: Float[Tensor, "H n n"], positions: Int[Tensor, "n 2"], query: Literal["class", "mean"] | None = None
) -> np.ndarray:
    """The map of one picture, as `attention_maps` gives it.

    Args:
        positions: row and column of each patch, -1 for special rows.
    """
    places = positions.cpu().numpy()
    is_patch = places.min(1) >= 0
    query = query or ("mean" if is_patch[0] else "class")
    if query == "class" and is_patch[0]:
        raise ConfigError("query class needs a class row before the patches and this model has none; use mean")
    maps_Hnn = weights.float().cpu().numpy()
    rows_Hn = maps_Hnn[:, 0] if query == "class" else maps_Hnn[:, is_patch].mean(1)
    grid = places[is_patch] - places[is_patch].min(0)
    values = np.full((len(rows_Hn), *(grid.max(0) + 1)), np.nan, np.float32)
    values[:, grid[:, 0], grid[:, 1]] = rows_Hn[:, is_patch]
    return values


def draw_attention(maps: np.ndarray, image: np.ndarray) -> Any:
    """A figure of the picture, of the mean of the heads over it, and of each head over it.

    Args:
        maps: `[H, rows, columns]`.
        image: `[height, width, C]` values between 0 and 1, as the model saw it.
    """
    panels: list[tuple[str, np.ndarray | None]] = [("image", None), ("mean of the heads", maps.mean(0))]
    panels += [(f"head {head}", values) for head, values in enumerate(maps[:MAX_HEADS])]
    num_columns = min(len(panels), 5)
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(2.2 * num_columns, 2.4 * num_rows + 0.3)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    extent = (0, maps.shape[2], maps.shape[1], 0)
    shown = np.clip(image if image.shape[2] == 3 else np.repeat(image.mean(2, keepdims=True), 3, 2), 0, 1)
    for axis, (name, values) in zip(axes, panels):
        axis.imshow(shown, extent=extent)
        if values is not None:
            axis.imshow(values, cmap="inferno", alpha=0.6, extent=extent)
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
