"""Changing a model of patches to a grid other than the one that it was trained on."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from meristem.errors import ConfigError
from meristem.model.config import Learned, TransformerConfig
from meristem.model.position import resample_grid
from meristem.shapes import Tensor

TABLE = "embedding.position.table.weight"
"""End of the name of a table of positions in the state of a model."""


def with_grid(config: TransformerConfig, grid: tuple[int, ...]) -> TransformerConfig:
    """The config of the model for another grid. Positions without a table need no change.

    Args:
        grid: rows and columns of patches; empty where each payload has its own.

    Raises:
        ConfigError: the model has a table of positions, and `grid` is empty or has another number of axes.
    """
    position = config.position
    if not isinstance(position, Learned) or not position.grid or tuple(grid) == position.grid:
        return config
    if len(grid) != len(position.grid):
        raise ConfigError(
            f"a table of positions for {position.grid} places serves no payloads with a grid of their own each: "
            "use SinCos2D, or Rotary with two axes, or one grid for all"
        )
    places = position.offset + math.prod(grid)
    return replace(config, position=replace(position, max_positions=places, grid=tuple(grid)))


def resampled(tensors: Mapping[str, Tensor], old: TransformerConfig, new: TransformerConfig) -> dict[str, Tensor]:
    """Tensors of a model, with the table of positions interpolated from the grid of `old` to that of `new`."""
    before, after = old.position, new.position
    if before == after or not (isinstance(before, Learned) and isinstance(after, Learned)):
        return dict(tensors)
    (rows, columns), (new_rows, new_columns) = before.grid, after.grid

    def change(table: Tensor) -> Tensor:
        places = table[before.offset : before.offset + rows * columns]
        return torch.cat([table[: before.offset], resample_grid(places, (rows, columns), (new_rows, new_columns))])

    return {name: change(value) if name.endswith(TABLE) else value for name, value in tensors.items()}
