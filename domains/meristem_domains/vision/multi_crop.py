"""Several random crops of one picture: resized, flipped, recoloured, blurred and solarised.

All random numbers come from one generator. Values are float32 between 0 and 1 throughout.
"""

import math
from dataclasses import dataclass

import numpy as np

from meristem.errors import require
from meristem_domains.vision.pictures import as_floats, resize_channels

NUM_GLOBAL = 2
"""Number of large crops of a picture."""

RATIOS = (3 / 4, 4 / 3)
"""Least and largest ratio of width to height of the part of a picture that is resized to a square."""

TRIES = 10
"""Number of random parts that are tried before the middle is taken. In a long picture, none may fit."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in a grey value (ITU-R BT.601)."""

_TO_YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]], np.float64)

_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Two large and some small crops with the augmentations of DINO (Caron 2021, arXiv 2104.14294, section 3.1).

    Saturation and hue are changed only in pictures of three channels.

    Attributes:
        global_px: side of a large crop.
        local_px: side of a small crop; below `global_px`.
        num_local: number of small crops.
        global_scale: least and largest share of the picture's area that a large crop shows.
        local_scale: least and largest share that a small crop shows.
        flip_rate: probability that a crop is flipped left to right.
        jitter_rate: probability that brightness, contrast, saturation and hue of a crop are changed.
        jitter: strength x of each of these changes: a factor between 1 - x and 1 + x, for the hue a rotation by up to
            x of a full turn. The hue is rotated in YIQ, which keeps the brightness, and not in HSV.
        grey_rate: probability that a crop is made grey.
        blur_rates: probability that the first large crop, the second, or a small crop is blurred.
        blur_px: least and largest standard deviation of the blur.
        solarise_rate: probability that values of one half or more are inverted in the second large crop.
    """

    global_px: int
    local_px: int
    num_local: int = 6
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip_rate: float = 0.5
    jitter_rate: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey_rate: float = 0.2
    blur_rates: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_px: tuple[float, float] = (0.1, 2.0)
    solarise_rate: float = 0.2

    def __post_init__(self) -> None:
        # YAML gives lists; the values are compared as tuples
        for name, count in (("global_scale", 2), ("local_scale", 2), ("jitter", 4), ("blur_rates", 3), ("blur_px", 2)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            require(len(value) == count, f"objective.crops.{name} must be {count} numbers", list(value))
        sides = [self.local_px, self.global_px]
        require(0 < sides[0] < sides[1], "objective.crops.local_px must be 1 or more and below global_px", sides)
        require(self.num_local >= 0, "objective.crops.num_local must be 0 or more", self.num_local)
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            require(0 < low <= high <= 1, f"objective.crops.{name} must rise, from above 0 to 1 at most", [low, high])
        rates = [self.flip_rate, self.jitter_rate, self.grey_rate, *self.blur_rates, self.solarise_rate]
        require(all(0 <= rate <= 1 for rate in rates), "objective.crops.every rate must be between 0 and 1", rates)
        jitter, blur_px = list(self.jitter), list(self.blur_px)
        is_right = all(0 <= much <= 1 for much in jitter) and jitter[3] <= 0.5
        require(is_right, "objective.crops.jitter must lie between 0 and 1, of the hue between 0 and 0.5", jitter)
        require(0 < blur_px[0] <= blur_px[1], "objective.crops.blur_px must rise, from above 0", blur_px)

    @property
    def num_views(self) -> int:
        return NUM_GLOBAL + self.num_local

    def draw(self, pixels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """The crops of a picture, the two large ones first: `[side, side, C]` float32 between 0 and 1.

        Args:
            pixels: `[H, W, C]`, bytes or floats between 0 and 1.
        """
        sides = [self.global_px] * NUM_GLOBAL + [self.local_px] * self.num_local
        return [self._view(pixels, view, side, rng) for view, side in enumerate(sides)]

    def _view(self, pixels: np.ndarray, view: int, side: int, rng: np.random.Generator) -> np.ndarray:
        scale = self.global_scale if view < NUM_GLOBAL else self.local_scale
        values = resize(random_part(pixels, scale, rng), side)
        if rng.random() < self.flip_rate:
            values = values[:, ::-1]
        if rng.random() < self.jitter_rate:
            values = self._recolour(values, rng)
        if rng.random() < self.grey_rate and values.shape[2] == 3:
            values = np.repeat((values @ LUMA)[..., None], 3, axis=2)
        if rng.random() < self.blur_rates[min(view, NUM_GLOBAL)]:
            values = blur(values, rng.uniform(*self.blur_px))
        if view == 1 and rng.random() < self.solarise_rate:
            values = np.where(values < 0.5, values, 1 - values)
        return np.ascontiguousarray(values, np.float32)

    def _recolour(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        factors = (1 + np.array(self.jitter[:3]) * rng.uniform(-1, 1, 3)).astype(np.float32)
        turn = self.jitter[3] * rng.uniform(-1, 1)
        is_coloured = values.shape[2] == 3
        for step in rng.permutation(4).tolist():
            if step == 0:
                values = values * factors[0]
            elif step == 1:
                grey = (values @ LUMA).mean() if is_coloured else values.mean()
                values = grey + (values - grey) * factors[1]
            elif step == 2 and is_coloured:
                greys = (values @ LUMA)[..., None]
                values = greys + (values - greys) * factors[2]
            elif step == 3 and is_coloured:
                values = turn_hue(values, turn)
            values = values.clip(0, 1)
        return values


def random_part(pixels: np.ndarray, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random part whose share of the area lies within `scale` (Szegedy 2015, arXiv 1409.4842, section 6).

    Where no part fits within `TRIES`, it is the largest square of the middle.
    """
    height, width = pixels.shape[:2]
    for _ in range(TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            return pixels[top : top + high, left : left + wide]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """`[side, side, C]` float32 between 0 and 1, bicubic."""
    values = as_floats(pixels)
    if values.shape[:2] != (side, side):
        values = resize_channels(values, (side, side), "bicubic")
    # bicubic curves reach beyond
    return values.clip(0, 1)


def turn_hue(values: np.ndarray, turn: float) -> np.ndarray:
    """Rotate the hue by a share of a full turn; grey and the brightness stay as they are."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    turned = _FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _TO_YIQ
    return values @ turned.T.astype(np.float32)


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur over rows and columns. Beyond the edges there is nothing; the weights within sum to 1."""
    places = (np.arange(extent) for extent in values.shape[:2])
    bells = [np.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2) for place in places]
    rows, columns = ((bell / bell.sum(1, keepdims=True)).astype(np.float32) for bell in bells)
    # one matrix over the rows of all columns, one over the columns of all rows
    return columns @ (rows @ values.reshape(len(rows), -1)).reshape(values.shape)
