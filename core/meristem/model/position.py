"""Positions: vectors added to the embedding, rotations of queries and keys, and biases of their scores.

`build_added` builds the first sort, one for the whole model. `build_between` builds the others, one for all layers of a
stack that share it.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from meristem.model import exact
from meristem.model.compiler import fused
from meristem.model.config import position as configs
from meristem.shapes import Float, Int, Tensor

Tables = tuple[Tensor, ...]


class ScoreBias:
    """What is added to the scores of attention: a function of the distance of query and key within a sequence.

    Of nothing else: kernels look it up by distance. Made once a batch, so that layers share what was computed.

    Args:
        at: gives the bias `[H, m, n]` for queries at places `[m, 1]` and keys at places `[1, n]`.
    """

    def __init__(self, at: Callable[[Tensor, Tensor], Tensor], device: torch.device):
        self.at, self.device = at, device
        self._known: dict[tuple[int, int], Tensor] = {}

    def over(self, q_length: int, kv_length: int) -> Float[Tensor, "H m n"]:
        """For all keys of a sequence and its last `q_length` places as queries; remembered."""
        key = (q_length, kv_length)
        if key not in self._known:
            i = torch.arange(kv_length - q_length, kv_length, device=self.device)[:, None]
            self._known[key] = self.at(i, torch.arange(kv_length, device=self.device)[None, :])
        return self._known[key]


class BetweenLayer(nn.Module):
    """Base class of position modules that act between queries and keys. The base class itself does nothing."""

    def tables(self, positions: Int[Tensor, "T A"]) -> Tables:
        """Tensors that `turn` needs, computed once for a batch and shared by the layers."""
        return ()

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        """Rotate queries or keys by their positions."""
        return x

    def bias(self, device: torch.device) -> ScoreBias | None:
        """What is added to the scores in a batch; None for nothing."""
        return None


class RotaryLayer(BetweenLayer):
    """Rotary positions (Su 2021), in halves or interleaved, of all features of a head or of the first ones.

    Angles are taken in fp32 from integer positions whatever the precision of the model: tables made in bf16
    are wrong by 31 % rms at positions 256-512. Rows that have no place (-1) stand at 0.
    """

    def __init__(self, config: configs.Rotary, head_width: int):
        super().__init__()
        self.config, self.head_width = config, head_width
        self.width = config.width or head_width

    def tables(self, positions: Int[Tensor, "T A"]) -> Tables:
        """Cosine and sine `[T, 1, w / 2]` of the angle of each pair, in fp32."""
        axes = self.config.num_axes
        assert positions.shape[1] == axes, f"rotary positions have {axes} axes; got {positions.shape[1]}"
        frequencies = rotary_frequencies(self.config, self.head_width).to(positions.device, non_blocking=True)
        angles_TAf = positions.clamp(min=0).float()[:, :, None] * frequencies
        angles_T1p = angles_TAf.flatten(1)[:, None, :]
        return angles_T1p.cos(), angles_T1p.sin()

    def turn(self, x: Float[Tensor, "T H E"], tables: Tables) -> Float[Tensor, "T H E"]:
        """Rotate pairs by their angles; the two features of a pair come out as neighbours, whatever the config.

        Queries and keys alike, so their products are those of any other order.
        """
        turned, rest = x.split([self.width, self.head_width - self.width], dim=-1)
        cos, sin = tables
        is_one_pass = x.is_cpu and not torch.compiler.is_compiling()  # where products of halves would take six
        if is_one_pass and x.dtype == torch.bfloat16:
            turned = turned.float()
        if self.config.is_interleaved:
            first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = turned.chunk(2, dim=-1)
        if is_one_pass:
            pairs = torch.view_as_real(exact.multiply_rows(torch.complex(first, second), torch.complex(cos, sin)))
            turned = pairs.flatten(-2).to(x.dtype)
        else:
            turned = _turn_halves(first, second, cos, sin)
        return turned if self.width == self.head_width else torch.cat([turned, rest], dim=-1)


@fused
def _turn_halves(
    first_THp: Float[Tensor, "T H p"], second_THp: Float[Tensor, "T H p"], cos: Tensor, sin: Tensor
) -> Float[Tensor, "T H w"]:
    """Twelve passes over memory, unless it is one kernel."""
    pairs = torch.stack([first_THp * cos - second_THp * sin, second_THp * cos + first_THp * sin], dim=-1)
    return pairs.flatten(-2).to(first_THp.dtype)


def rotary_frequencies(config: configs.Rotary, head_width: int) -> Float[Tensor, "f"]:
    """Radians per place of each pair of one axis, in fp32, scaled, and rounded as when the model was trained."""
    width = (config.width or head_width) // config.num_axes
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies, scaling = 1.0 / (config.base**exponents), config.scaling
    if isinstance(scaling, configs.LinearScaling):
        frequencies = frequencies / scaling.factor
    if isinstance(scaling, configs.BandScaling):
        waves = 2 * math.pi / frequencies
        # 0 for long waves, 1 for short ones, linear in the number of waves between
        share = ((scaling.original_tokens / waves - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequencies = (1 - share) * frequencies / scaling.factor + share * frequencies
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.rounding]
    return frequencies.to(dtype).float()


class LinearBiasLayer(BetweenLayer):
    """A score falls with distance, by a fixed slope for each head (Press 2021)."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def bias(self, device: torch.device) -> ScoreBias:
        slopes_H11 = linear_slopes(self.num_heads).to(device)[:, None, None]
        return ScoreBias(lambda i, j: -slopes_H11 * (i - j).abs(), device)


def linear_slopes(num_heads: int) -> Float[Tensor, "H"]:
    """Slopes by head: `2 ** (-8 k / n)` for k in 1..n where n is a power of two, else as `LinearBias` says."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)]
    return torch.tensor([*slopes, *between][:num_heads])


class BucketBiasLayer(BetweenLayer):
    """A learned bias for each head and bucket of distances, one table for all layers (Raffel 2020)."""

    def __init__(self, config: configs.BucketBias, num_heads: int):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.num_buckets, num_heads)

    def bias(self, device: torch.device) -> ScoreBias:
        return ScoreBias(self._at, device)

    def _at(self, i: Int[Tensor, "m 1"], j: Int[Tensor, "1 n"]) -> Float[Tensor, "H m n"]:
        buckets_mn = distance_buckets(self.config, j - i)
        return self.table.weight.index_select(0, buckets_mn.flatten()).unflatten(0, buckets_mn.shape).permute(2, 0, 1)


def distance_buckets(config: configs.BucketBias, distance: Int[Tensor, "m n"]) -> Int[Tensor, "m n"]:
    """Bucket of each distance (place of the key less that of the query).

    Half of a side's buckets hold one distance each, the other half grow by logarithm up to `max_distance`. On one
    side only, keys behind the query fall into the bucket of distance 0.
    """
    num = config.num_buckets
    first = torch.zeros_like(distance)
    if config.is_two_sided:
        num //= 2
        first = (distance > 0).long() * num
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    num_exact = num // 2
    grown = torch.log(far.float().clamp(min=1) / num_exact) / math.log(config.max_distance / num_exact)
    shared = (num_exact + (grown * (num - num_exact)).long()).clamp(max=num - 1)
    return first + torch.where(far < num_exact, far, shared)


def build_between(config: configs.Position, head_width: int, num_heads: int) -> BetweenLayer:
    """Build the module of a position that acts between rows; one that does nothing for the other kinds."""
    match config:
        case configs.Rotary():
            return RotaryLayer(config, head_width)
        case configs.LinearBias():
            return LinearBiasLayer(num_heads)
        case configs.BucketBias():
            return BucketBiasLayer(config, num_heads)
        case _:
            return BetweenLayer()


class LearnedLayer(nn.Module):
    """A learned table of positions, with one row for each place."""

    def __init__(self, config: configs.Learned, width: int):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.max_positions, width)

    def forward(self, positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        grid = self.config.grid or (self.config.max_positions,)
        assert positions.shape[1] == len(grid), f"positions must have {len(grid)} axes; got {positions.shape[1]}"
        place = positions[:, 0]
        for axis, extent in enumerate(grid[1:], start=1):
            place = place * extent + positions[:, axis]
        has_place = (positions >= 0).all(1)
        rows = (place + self.config.offset).masked_fill(~has_place, 0)
        return self.table(rows) * has_place[:, None]


class SinusoidalLayer(nn.Module):
    """Sines at even features, cosines at odd ones, in fp32 (Vaswani 2017, section 3.5)."""

    def __init__(self, config: configs.Sinusoidal, width: int):
        super().__init__()
        self.config, self.width = config, width

    def forward(self, positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        assert positions.shape[1] == 1, f"sinusoidal positions have one axis; got {positions.shape[1]}"
        exponents = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angles = positions.float() / self.config.base**exponents
        added = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : self.width]
        return added * (positions >= 0)


class SinCos2DLayer(nn.Module):
    """Sines and cosines of two position axes, in fp32."""

    def __init__(self, config: configs.SinCos2D, width: int):
        super().__init__()
        self.config, self.width = config, width

    def forward(self, positions: Int[Tensor, "T A"]) -> Float[Tensor, "T D"]:
        assert positions.shape[1] == 2, f"these positions have two axes; got {positions.shape[1]}"
        count = self.width // 4
        steps = max(count - 1, 1) if self.config.reaches_base else count
        exponents = torch.arange(count, device=positions.device, dtype=torch.float32) / steps
        rows_Tf, columns_Tf = (positions.float()[:, axis, None] / self.config.base**exponents for axis in (0, 1))
        added = torch.cat([columns_Tf.sin(), columns_Tf.cos(), rows_Tf.sin(), rows_Tf.cos()], dim=1)
        return added * (positions >= 0).all(1, keepdim=True)


def resample_grid(table: Float[Tensor, "N D"], old: tuple[int, int], new: tuple[int, int]) -> Float[Tensor, "n D"]:
    """Interpolate a table of positions for another grid: bicubic, with antialiasing, in fp32.

    Args:
        table: one row for each place, in row-major order of the old grid.
        old, new: rows and columns of the grids.
    """
    assert len(table) == old[0] * old[1], f"{len(table)} rows for a grid of {old}"
    if tuple(old) == tuple(new):
        return table
    places = table.float().unflatten(0, old).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(places, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def build_added(config: configs.Position, width: int) -> nn.Module | None:
    """Build the module of a position that is added to the embedding; None for the other kinds.

    It gives what is added to each row: zeros for rows that have no place (-1).
    """
    match config:
        case configs.Learned():
            return LearnedLayer(config, width)
        case configs.Sinusoidal():
            return SinusoidalLayer(config, width)
        case configs.SinCos2D():
            return SinCos2DLayer(config, width)
        case _:
            return None
