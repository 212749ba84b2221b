"""The tokenizer of images: resize, crop, standardise, and cut into patches; and back.

Resizing and cropping follow the evaluation transforms of vision libraries. At native resolution an image keeps its size
and shape. Each patch is a token with features; symbols are only the class token, registers and the mask.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from meristem.data.tokenizer import Tokenizer, column_bytes
from meristem.errors import ConfigError, require
from meristem.types import TokenColumn, Tokens
from meristem_domains.vision.picture_sizes import CROPS, native_px, resized_px, resized_size
from meristem_domains.vision.pictures import (
    RefusedImage,
    StandardImage,
    as_floats,
    of_row,
    payload_of,
    picture_px,
    pixels_of,
    read_pixels,
    resize_channels,
)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class PatchTokenizer(Tokenizer):
    """Special symbols, then one token for each patch of an image.

    Features of a patch are ordered by (channel, row, column), like the weights of a convolution over patches.

    Attributes:
        image_px: height and width of every image after resizing and cropping; None for native resolution, where
            each image keeps its size and shape as far as `native_px` allows.
        patch_px: side of a patch; an image with a shorter side is refused.
        num_channels: number of channels that images are converted to, as `meristem_domains.vision.pictures` explains.
        mean: value of each channel that is subtracted from values between 0 and 1.
        std: value of each channel that the difference is divided by.
        resize_px: height and width that an image is resized to before `image_px` is cut out of its centre; None to
            compute them from `crop_frac`.
        crop: how an image of another shape is resized, one of `CROPS`.
        interpolation: one of `INTERPOLATIONS`, as implemented by Pillow.
        prefix: special symbols before the patches: class token, distillation token, registers.
        mask: the symbol that hides a patch; empty for none.
        max_patches: most patches of an image at native resolution; a larger image is shrunk.
        crop_frac: ratio of `image_px` to the size of the resized image (timm's `crop_pct`).
    """

    kind: ClassVar[str] = "patches"

    image_px: tuple[int, int] | None
    patch_px: int
    num_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize_px: tuple[int, int] | None = None
    crop: str = "center"
    interpolation: str = "bicubic"
    prefix: tuple[str, ...] = ("<class>",)
    mask: str = ""
    max_patches: int | None = None
    crop_frac: float = 1.0

    def __post_init__(self) -> None:
        # JSON gives lists; the tokenizer compares and hashes by value
        for name in ("image_px", "mean", "std", "resize_px", "prefix"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        for name in ("image_px", "resize_px"):
            size = getattr(self, name)
            is_size = size is None or (len(size) == 2 and min(size) >= 1)
            require(is_size, f"{name} must be a height and a width of 1 or more", size and list(size))
        sides, crop_frac, num_channels = self.image_px or (), self.crop_frac, self.num_channels
        is_whole = self.patch_px >= 1 and not any(side % self.patch_px for side in sides)
        got = f"{self.patch_px} for {' x '.join(map(str, sides))}"
        require(is_whole, "patch_px must divide the height and the width of image_px", got)
        require(0 < crop_frac <= 1, "crop_frac must be above 0 and at most 1", crop_frac)
        is_one = crop_frac == 1 or self.resize_px is None
        got = f"{list(self.resize_px or ())} and {crop_frac}"
        require(is_one, "one of resize_px and crop_frac must be set", got)
        rule = "one of image_px and max_patches must be set, the second for native resolution"
        is_one = (self.image_px is None) != (self.max_patches is None)
        require(is_one, rule, f"{self.image_px} and {self.max_patches}")
        if self.max_patches is not None:
            require(self.max_patches >= 1, "max_patches must be 1 or more", self.max_patches)
            is_whole = self.resize_px is None and crop_frac == 1 and self.crop == "squash"
            rule = "images at native resolution are not cropped: resize_px must be None, crop_frac 1 and crop squash"
            require(is_whole, rule, f"{self.resize_px}, {crop_frac} and {self.crop!r}")
        is_each = len(self.mean) == len(self.std) == num_channels
        rule = f"mean and std must have one value for each of {num_channels} channels"
        require(is_each, rule, f"{len(self.mean)} and {len(self.std)}")
        require(min(self.std) > 0, "std must be above 0", min(self.std))
        for name, allowed in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, name)
            require(value in allowed, f"{name} must be one of {', '.join(allowed)}", repr(value))
        require(len(set(self.vocab)) == len(self.vocab), "prefix and mask must hold each symbol once", self.vocab)

    @property
    def vocab(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.prefix, self.mask) if self.mask else self.prefix

    @property
    def num_special(self) -> tuple[int, int]:
        return len(self.prefix), 0

    @property
    def mask_id(self) -> int | None:
        return len(self.prefix) if self.mask else None

    @property
    def random_ids(self) -> np.ndarray:
        return np.zeros(0, np.int64)

    @property
    def num_features(self) -> int:
        return self.num_channels * self.patch_px**2

    @property
    def num_axes(self) -> int:
        return 2

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of rows and columns of patches; empty at native resolution."""
        return tuple(side // self.patch_px for side in self.image_px or ())

    @property
    def fixed_px(self) -> tuple[int, int]:
        """`image_px`, which must be set.

        Raises:
            ConfigError: images are read at native resolution.
        """
        if self.image_px is None:
            raise ConfigError("images must be of one size here; at native resolution each keeps its own (image_px)")
        return self.image_px

    @property
    def uncropped_px(self) -> tuple[int, int]:
        """Height and width that every image is resized to before it is cropped.

        Raises:
            ConfigError: images are read at native resolution.
        """
        return self.resize_px or resized_px(self.fixed_px, self.crop_frac)

    def of_size(self, image_px: tuple[int, int]) -> "PatchTokenizer":
        """The same tokenizer for another `image_px`, with the same share cropped.

        Raises:
            ConfigError: images are read at native resolution, or `patch_px` does not divide the new size.
        """
        old = self.fixed_px
        resize_px = self.resize_px
        if resize_px is not None:
            resize_px = (round(resize_px[0] * image_px[0] / old[0]), round(resize_px[1] * image_px[1] / old[1]))
        return replace(self, image_px=image_px, resize_px=resize_px)

    def adapted(self, build: Callable[..., Tokenizer], options: Mapping[str, Any]) -> Tokenizer:
        """This tokenizer with the size and crop that `options` ask for; other options must agree with the model."""
        if not isinstance(build(), PatchTokenizer):
            return super().adapted(build, options)
        wanted = build(**{"patch_px": self.patch_px, **options})
        assert isinstance(wanted, PatchTokenizer)
        for name in ("patch_px", "num_channels", "mean", "std", "interpolation"):
            own, got = getattr(self, name), getattr(wanted, name)
            require(name not in options or own == got, f"tokenizer option {name} must be {own}, as of the model", got)
        if {"has_class", "num_registers"} & set(options) and len(wanted.prefix) != len(self.prefix):
            raise ConfigError(
                f"tokenizer options has_class and num_registers must give {len(self.prefix)} special rows, as of the "
                f"model; got {len(wanted.prefix)}"
            )
        if "image_px" in options and wanted.image_px is None:
            return replace(
                self, image_px=None, resize_px=None, crop_frac=1.0, crop="squash", max_patches=wanted.max_patches
            )
        changed = self.of_size(wanted.image_px) if "image_px" in options and wanted.image_px else self
        if "crop_frac" in options:
            changed = replace(changed, resize_px=None, crop_frac=wanted.crop_frac)
        return replace(changed, crop=wanted.crop) if "crop" in options else changed

    def encode(self, payload: bytes | np.ndarray | StandardImage) -> Tokens:
        """Encode one image.

        Args:
            payload: an encoded image, `[H, W, C]` values (uint8, or floats between 0 and 1), or a `StandardImage`.

        Raises:
            DataError: the payload is not an image, or has another number of channels.
        """
        return self.tokens_at(self._column([self._grid_of(self.pixels(payload))]), 0)

    def encode_column(self, payloads: pa.Array) -> TokenColumn:
        return self._column([self._grid_of(self.pixels(one, row)) for row, one in enumerate(_encoded(payloads))])

    def encode_values(self, values: Sequence[Any]) -> TokenColumn:
        """Encode images that a program passes: paths, encoded bytes, Pillow images, or arrays."""
        images = []
        for row, value in enumerate(values):
            try:
                images.append(self._grid_of(self.pixels(payload_of(value, row), row)))
            except RefusedImage as error:
                if not isinstance(value, str | Path) or str(error).startswith(f"{value}: "):
                    raise
                raise RefusedImage(row, f"{value}: {error}") from error
        return self._column(images)

    def lengths(self, payloads: pa.Array) -> np.ndarray:
        """`[N]` number of tokens of each image, from its header only.

        Raises:
            RefusedImage: a payload is not an image, or too small for a patch.
        """
        found = np.empty(len(payloads), np.int64)
        for row, encoded in enumerate(_encoded(payloads)):
            if self.num_channels > 4:  # pages, which the header does not tell of
                found[row] = math.prod(self._grid_of_size(self.pixels(encoded, row).shape))
                continue
            with of_row(row):
                size = picture_px(encoded)
            self._check_size(size, row)
            found[row] = math.prod(self._grid_of_size(size))
        return found + len(self.prefix)

    def length_of(self, sizes: np.ndarray) -> np.ndarray:
        return np.full(len(sizes), len(self.prefix) + (self.max_patches or math.prod(self.grid)))

    def decode(self, tokens: Tokens) -> np.ndarray:
        """The resized and cropped image: `[H, W, C]` float32 values between 0 and 1."""
        assert tokens.features is not None
        (rows, columns), side = (tokens.positions.max(axis=0) + 1).tolist(), self.patch_px
        patches = tokens.features[len(self.prefix) :].reshape(rows, columns, self.num_channels, side, side)
        image = patches.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, self.num_channels)
        return image * np.array(self.std, np.float32) + np.array(self.mean, np.float32)

    def to_json(self) -> dict[str, Any]:
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.crop_frac == 1:  # as in directories that were written before the option existed
            del values["crop_frac"]
        return values

    def _column(self, images: list[np.ndarray]) -> TokenColumn:
        """Tokens of images that are given as `[rows, columns, P]`."""
        before = len(self.prefix)
        counts = np.array([before + image.shape[0] * image.shape[1] for image in images], np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        features = np.zeros((offsets[-1], self.num_features), np.float32)
        ids = np.full(offsets[-1], -1, np.int32)
        positions = np.full((offsets[-1], 2), -1, np.int64)
        for image, start, stop in zip(images, offsets[:-1], offsets[1:]):
            features[start + before : stop] = image.reshape(-1, self.num_features)
            ids[start : start + before] = np.arange(before)
            positions[start + before : stop] = np.indices(image.shape[:2]).reshape(2, -1).T
        return TokenColumn(ids=ids, offsets=offsets, features=features, positions=positions, is_special=ids >= 0)

    def pixels(self, payload: Any, row: int = 0) -> Any:
        """`[H, W, C]` uint8 or float32 values of a payload, decoded where needed; a `StandardImage` stays as it is."""
        if isinstance(payload, StandardImage):
            return payload
        if isinstance(payload, np.ndarray):
            pixels = self._values_of(payload, row)
        else:
            read = read_pixels if isinstance(payload, bytes) else pixels_of
            with of_row(row):
                pixels = read(payload, self.num_channels)
        self._check_size(pixels.shape, row)
        return pixels

    def _values_of(self, array: np.ndarray, row: int) -> np.ndarray:
        if array.ndim == 2 and self.num_channels == 1:
            array = array[..., None]
        if array.ndim != 3 or array.shape[2] != self.num_channels or not array.size:
            raise RefusedImage(
                row, f"an image must be [height, width, {self.num_channels}]; got {list(array.shape)} (several: a list)"
            )
        if array.dtype == np.uint8:
            return array
        if array.dtype == np.uint16:
            return array.astype(np.float32) / np.float32(65535)
        least, most = float(array.min()), float(array.max())
        # a resized image reaches beyond a little; not-a-number fails both
        if not np.issubdtype(array.dtype, np.floating) or not (least > -1 and most < 2):
            kinds = "uint8, uint16, or floats between 0 and 1"
            raise RefusedImage(row, f"an image must be {kinds}; got {array.dtype} from {least:.6g} to {most:.6g}")
        return array.astype(np.float32)

    def _check_size(self, size: tuple[int, ...], row: int) -> None:
        if min(size[:2]) < self.patch_px:
            raise RefusedImage(
                row, f"an image must be a patch or more high and wide, {self.patch_px} px; got {size[0]} x {size[1]}"
            )

    def _grid_of_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        if self.max_patches is None:
            return self.grid
        return tuple(side // self.patch_px for side in native_px(size, self.patch_px, self.max_patches))

    def standardised(self, pixels: np.ndarray) -> StandardImage:
        """Resize, crop and standardise an image.

        Args:
            pixels: `[H, W, C]` uint8, or floats between 0 and 1.
        """
        rows, columns = self._grid_of_size(pixels.shape)
        size = (rows * self.patch_px, columns * self.patch_px)
        pixels = self._cut(self._resized(pixels, size), size)
        return StandardImage((as_floats(pixels) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32))

    def _grid_of(self, pixels: np.ndarray | StandardImage) -> np.ndarray:
        """`[rows, columns, P]` standardised values of an image."""
        values = (pixels if isinstance(pixels, StandardImage) else self.standardised(pixels)).values
        (rows, columns), side = (n // self.patch_px for n in values.shape[:2]), self.patch_px
        patches = values.reshape(rows, side, columns, side, self.num_channels).transpose(0, 2, 4, 1, 3)
        return patches.reshape(rows, columns, -1)

    def _resized(self, pixels: np.ndarray, image_px: tuple[int, int]) -> np.ndarray:
        before = self.resize_px or resized_px(image_px, self.crop_frac)
        size = resized_size(pixels.shape[:2], before, self.crop)
        if size == pixels.shape[:2]:
            return pixels
        return resize_channels(pixels, size, self.interpolation)

    def _cut(self, pixels: np.ndarray, image_px: tuple[int, int]) -> np.ndarray:
        """The centre of an image, of size `image_px`; a smaller image is padded first."""
        lacking = [max(wanted - got, 0) for wanted, got in zip(image_px, pixels.shape)]
        if any(lacking):
            fill = [round(255 * mean) if self.crop == "border" else 0 for mean in self.mean]
            values = np.array(fill, np.uint8) if pixels.dtype == np.uint8 else np.array(fill, np.float32) / 255
            (height, width), (above, left) = pixels.shape[:2], (n // 2 for n in lacking)
            canvas = np.empty((height + lacking[0], width + lacking[1], self.num_channels), pixels.dtype)
            canvas[:] = values
            canvas[above : above + height, left : left + width] = pixels
            pixels = canvas
        # halves are rounded to even
        top, left = (round((got - wanted) / 2) for got, wanted in zip(pixels.shape, image_px))
        return pixels[top : top + image_px[0], left : left + image_px[1]]


def _encoded(payloads: pa.Array) -> Iterator[bytes]:
    column_bytes(payloads)  # refuses what is no column of bytes
    return (payload.as_buffer().to_pybytes() for payload in payloads)
