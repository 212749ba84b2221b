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

    def tables(self, positions: Int[Tensor, "T A"], dtype: torch.dtype) -> Tables:
        """What `turn` needs, computed once a batch and shared by the layers."""
        return ()

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        """Turn queries or keys by their positions."""
        return x


class RotaryLayer(PositionLayer):
    """Rotary positions, half against half (Su 2021).

    Angles are taken in fp32 from integer positions whatever the precision of the model: tables made in bf16
    are wrong by 31 % rms at positions 256-512.
    """

    def __init__(self, config: Rotary, head_width: int):
        super().__init__()
        self.base, self.head_width = config.base, head_width

    def tables(self, positions: Int[Tensor, "T A"], dtype: torch.dtype) -> Tables:
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / (self.base ** (exponents / self.head_width))
        angles = positions[:, :1].float() * frequencies
        angles_T1E = torch.cat([angles, angles], dim=-1)[:, None, :]
        # the sign of the rotation is put into the sine, so that turning is one roll and two products
        half = self.head_width // 2
        sign = torch.ones(self.head_width, device=positions.device)
        sign[:half] = -1.0
        return angles_T1E.cos().to(dtype), (angles_T1E.sin() * sign).to(dtype)

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        cos, sin = tables
        return x * cos + x.roll(self.head_width // 2, dims=-1) * sin


class LearnedLayer(PositionLayer):
    """A learned table, one row a place."""

    def __init__(self, config: Learned, width: int):
        super().__init__()
        self.offset = config.offset
        self.table = nn.Embedding(config.max_positions, width)

    def add(self, x: Float[Tensor, "T D"], positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        return x + self.table(positions[:, 0] + self.offset)


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
