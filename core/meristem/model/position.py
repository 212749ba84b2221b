"""Positions: what is added to the embedding, and what turns queries and keys.

Every kind has the same three hooks, each doing nothing unless the kind needs it: `add` to the embedding,
`tables` once a batch, and `turn` queries and keys in each layer.
"""

import torch
from torch import nn

from meristem.model.config import Learned, NoPosition, Position, Rotary
from meristem.shapes import Float, Int, Tensor

Tables = tuple[Tensor, ...]


class PositionLayer(nn.Module):
    """No position at all, and the hooks that a kind of position may fill."""

    def add(self, x: Float[Tensor, "T D"], positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        """Add positions to the embedding."""
        return x

    def tables(self, positions: Int[Tensor, "T A"]) -> Tables:
        """What `turn` needs, computed once a batch and shared by the layers."""
        return ()

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        """Turn queries or keys by their positions."""
        return x


class RotaryLayer(PositionLayer):
    """Rotary positions, half against half (Su 2021).

    Angles are taken in fp32 from integer positions whatever the precision of the model: tables made in bf16
    are wrong by 31 % rms at positions 256-512. Rows that have no place (-1) stand at 0.
    """

    def __init__(self, config: Rotary, head_width: int):
        super().__init__()
        self.config, self.head_width = config, head_width

    def tables(self, positions: Int[Tensor, "T A"]) -> Tables:
        assert positions.shape[1] == 1, f"rotary positions have one axis; got {positions.shape[1]}"
        frequencies = rotary_frequencies(self.config, self.head_width).to(positions.device, non_blocking=True)
        angles = positions.clamp(min=0).float() * frequencies
        angles_T1E = torch.cat([angles, angles], dim=-1)[:, None, :]
        # the sign of the rotation is put into the sine, so that turning is one roll and two products
        half = self.head_width // 2
        sign = torch.ones(self.head_width, device=positions.device)
        sign[:half] = -1.0
        return angles_T1E.cos(), angles_T1E.sin() * sign

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        cos, sin = tables
        return (x * cos + x.roll(self.head_width // 2, dims=-1) * sin).to(x.dtype)


def rotary_frequencies(config: Rotary, head_width: int) -> Float[Tensor, "half_E"]:
    """Radians a place of each pair of features, fp32, rounded as the model was trained."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.rounding]
    return (1.0 / (config.base**exponents)).to(dtype).float()


class LearnedLayer(PositionLayer):
    """A learned table, one row a place."""

    def __init__(self, config: Learned, width: int):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.max_positions, width)

    def add(self, x: Float[Tensor, "T D"], positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        grid = self.config.grid or (self.config.max_positions,)
        assert positions.shape[1] == len(grid), f"positions must have {len(grid)} axes; got {positions.shape[1]}"
        place = positions[:, 0]
        for axis, extent in enumerate(grid[1:], start=1):
            place = place * extent + positions[:, axis]
        has_place = (positions >= 0).all(1)
        rows = (place + self.config.offset).masked_fill(~has_place, 0)
        return x + self.table(rows) * has_place[:, None]


def build_position(config: Position, width: int, head_width: int) -> PositionLayer:
    """The module of a kind of position."""
    match config:
        case Rotary():
            return RotaryLayer(config, head_width)
        case Learned():
            return LearnedLayer(config, width)
        case NoPosition():
            return PositionLayer()
        case _:
            raise AssertionError(config)
