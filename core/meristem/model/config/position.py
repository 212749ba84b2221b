"""Configs of positions: how the trunk knows the place of a row.

Some are added to the embedding (`AddedPosition`), the others act between a query and a key, in each layer.
"""

import math
from abc import ABC
from dataclasses import dataclass, field
from typing import Literal

from meristem.errors import require
from meristem.model.config.checks import require_all, require_one_of

Rounding = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Scaling(ABC):
    """How rotary frequencies are changed for sequences longer than the model was first trained on."""


@dataclass(frozen=True, kw_only=True)
class NoScaling(Scaling):
    """Frequencies are not changed."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Every place counts as `1 / factor` of one (position interpolation, Chen 2023, arXiv 2306.15595).

    Attributes:
        factor: 1 or more.
    """

    factor: float

    def __post_init__(self) -> None:
        require_all(self, "position.scaling.", "1 or more", "factor")


@dataclass(frozen=True, kw_only=True)
class BandScaling(Scaling):
    """Long waves are stretched by `factor`, short ones stay, those between are blended (Dubey 2024, arXiv 2407.21783).

    Attributes:
        factor: factor by which long waves are stretched.
        low: waves longer than `original_tokens / low` are long.
        high: waves shorter than `original_tokens / high` are short.
        original_tokens: sequence length that the model was first trained on.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_tokens: int = 8192

    def __post_init__(self) -> None:
        require_all(self, "position.scaling.", "1 or more", "factor")
        require(0 < self.low < self.high, "position.scaling needs 0 < low < high", f"{self.low}, {self.high}")
        require_all(self, "position.scaling.", "positive", "original_tokens")


@dataclass(frozen=True, kw_only=True)
class Position(ABC):
    """How the trunk knows the place of a row."""


@dataclass(frozen=True, kw_only=True)
class Rotary(Position):
    """Rotary positions (Su 2021, arXiv 2104.09864): pairs of features of queries and keys are rotated.

    Attributes:
        base: base of the geometric series of wavelengths.
        width: number of features of a head that are rotated, from the first one on; None for all.
        is_interleaved: whether a pair is two neighbours, rather than a feature of the first half and one of the second.
        num_axes: number of position axes; each has an equal share of the pairs, one axis after the other.
        scaling: how the frequencies are scaled.
        rounding: precision that the frequencies were rounded to when the model was trained. Checkpoints kept in half
            precision carry rounded frequencies, and were trained with them. Angles are always computed in fp32.
    """

    base: float = 10000.0
    width: int | None = None
    is_interleaved: bool = False
    num_axes: int = 1
    scaling: Scaling = field(default_factory=NoScaling)
    rounding: Rounding = "fp32"

    def __post_init__(self) -> None:
        require_all(self, "position.", "positive", "base", "num_axes", "width")
        require_one_of(self.rounding, Rounding, "position.rounding")


@dataclass(frozen=True, kw_only=True)
class Learned(Position):
    """A learned table of positions, added to the embedding; rows that have no place (-1) get nothing.

    Attributes:
        max_positions: number of rows in the table.
        offset: row of the first place; some models leave the first rows unused.
        grid: number of places along each position axis, in row-major order; empty for a sequence.
    """

    max_positions: int = 1024
    offset: int = 0
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        require(0 <= self.offset < self.max_positions, "position.offset must be within the table", self.offset)
        is_held = self.offset + math.prod(self.grid) <= self.max_positions
        got = f"max_positions={self.max_positions}, offset={self.offset}, grid={list(self.grid)}"
        require(is_held, "position.max_positions must hold the grid behind the offset", got)


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Position):
    """Sines and cosines of the place, added to the embedding (Vaswani 2017, arXiv 1706.03762, section 3.5).

    Attributes:
        base: base of the geometric series of wavelengths.
    """

    base: float = 10000.0

    def __post_init__(self) -> None:
        require_all(self, "position.", "positive", "base")


@dataclass(frozen=True, kw_only=True)
class SinCos2D(Position):
    """Sines and cosines of column and row, added to the embedding; rows that have no place (-1) get nothing.

    A quarter of the features each: sines of the column, cosines of the column, then those of the row. Frequencies are
    `base ** -e`, with exponents e from 0 evenly up to 1. Two conventions are at large and are not interchangeable: the
    last exponent is below 1 by a step (He 2022, arXiv 2111.06377), or it is 1 (Beyer 2022, arXiv 2205.01580).

    Attributes:
        base: base of the geometric series of wavelengths.
        reaches_base: whether the last exponent is 1.
    """

    base: float = 10000.0
    reaches_base: bool = False

    def __post_init__(self) -> None:
        require_all(self, "position.", "positive", "base")


@dataclass(frozen=True, kw_only=True)
class LinearBias(Position):
    """A score falls with the distance of query and key, in each head by a slope of its own (ALiBi).

    Press 2021 (arXiv 2108.12409); with the absolute distance, for keys on both sides, as others extend it. For a
    number of heads that is no power of two the slopes are those of the power below and every second one of the next.
    """


@dataclass(frozen=True, kw_only=True)
class BucketBias(Position):
    """A learned bias of the score for each head and bucket of distances (Raffel 2020, arXiv 1910.10683).

    One table for all layers of a stack. Near distances have a bucket each, far ones share them by logarithm.

    Attributes:
        num_buckets: number of rows in the table.
        max_distance: distance in tokens from which on all keys share the last bucket.
        is_two_sided: whether keys behind the query have buckets of their own, half of all.
    """

    num_buckets: int = 32
    max_distance: int = 128
    is_two_sided: bool = True

    def __post_init__(self) -> None:
        unit = 4 if self.is_two_sided else 2  # on each side half of the buckets hold one distance each
        is_multiple = self.num_buckets >= unit and self.num_buckets % unit == 0
        require(is_multiple, f"position.num_buckets must be a multiple of {unit}", self.num_buckets)
        rule = "position.max_distance must reach beyond the buckets of one distance each"
        got = f"max_distance={self.max_distance}, num_buckets={self.num_buckets}"
        require(self.max_distance > self.num_buckets // unit, rule, got)


@dataclass(frozen=True, kw_only=True)
class NoPosition(Position):
    """No positions: the rows are a set."""


AddedPosition = Learned | Sinusoidal | SinCos2D
"""Kinds that are added to the embedding; the others act in each layer."""
