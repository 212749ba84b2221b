"""Decoding of pictures to pixels by Pillow: upright, with the number of channels that is asked for.

Of a file with several frames (GIF) or pages (TIFF) the first is read. Where more than four channels are asked for, each
page of a TIFF file is a channel. Without an alpha channel, transparent pixels have the colours that the file has.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import ConfigError, DataError, UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Endings of the file names of pictures, in lower case."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode that a picture of one page is converted to, by number of channels."""

DEEP_FORMATS = ("PNG", "PPM")
"""Formats of 16 bits whose values Pillow may give in 32 bits."""

TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Pillow's transpose that makes a picture upright, by its EXIF orientation."""

ORIENTATION = 0x0112

_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")


class NoPicture(DataError):
    """Bytes that are not a picture, or a picture that cannot be used."""


@dataclass(frozen=True, eq=False)
class StandardImage:
    """An image that is already resized and standardised. The tokenizer only cuts it into patches.

    Attributes:
        values: `[H, W, C]` float32, with the mean subtracted and divided by the standard deviation.
    """

    values: np.ndarray


class RefusedImage(RefusedSymbol):
    """A payload that is not an image, or not one that the tokenizer accepts."""

    def __init__(self, row: int, reason: str):
        Exception.__init__(self, reason)
        self.row, self.offset, self.symbol = row, 0, ""


@contextmanager
def of_row(row: int) -> Iterator[None]:
    """Add the row of the column to the error of a payload that is not a picture."""
    try:
        yield
    except NoPicture as error:
        raise RefusedImage(row, str(error)) from error


def payload_of(value: Any, row: int) -> Any:
    """The payload for an image that a program passes: the bytes of a path, or the value itself."""
    if isinstance(value, str | Path):
        try:
            return Path(value).read_bytes()
        except (OSError, ValueError) as error:
            raise RefusedImage(row, f"{value}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(value, bytes | np.ndarray | StandardImage) or hasattr(value, "getbands"):
        return value
    if hasattr(value, "detach"):
        array = value.detach().cpu().numpy()
        return array.transpose(1, 2, 0) if array.ndim == 3 else array
    kinds = (
        "a path, encoded bytes, an image of Pillow, an array [height, width, channels] or a tensor of torch "
        "[channels, height, width]"
    )
    raise RefusedImage(row, f"an image must be {kinds}; got {type(value).__name__}")


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins with `head` is a picture, by its first bytes."""
    return head.startswith(_MAGICS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def read_pixels(payload: bytes, num_channels: int) -> np.ndarray:
    """`[H, W, C]` values of a picture: uint8, or float32 between 0 and 1 where the file has 16 bits.

    Raises:
        NoPicture: it cannot be decoded, or not to this number of channels.
        ConfigError: Pillow is not installed.
    """
    with _opened(payload) as image:
        if num_channels in MODES:
            return _pixels(image, num_channels)
        frames = getattr(image, "n_frames", 1)
        if frames != num_channels or len(image.getbands()) != 1:
            raise NoPicture(
                f"an image of {num_channels} channels must have so many pages of one channel each; "
                f"got {frames} page(s) of {len(image.getbands())}"
            )
        pages = []
        for page in range(num_channels):
            image.seek(page)
            pages.append(_pixels(image, 1))
        if len({(page.shape, page.dtype) for page in pages}) > 1:
            raise NoPicture("pages must be of one size and depth to be channels of one image; these differ")
        return np.concatenate(pages, axis=2)


def pixels_of(image: Any, num_channels: int) -> np.ndarray:
    """`[H, W, C]` values of a Pillow image, as `read_pixels` gives them.

    Raises:
        NoPicture: it cannot be converted to this number of channels.
    """
    if num_channels not in MODES:
        raise NoPicture(f"an image of {num_channels} channels must be an array or a TIFF file; got an image of Pillow")
    with _explained():
        return _pixels(image, num_channels)


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Values of an image as float32 between 0 and 1; floats stay as they are."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32, copy=False)


def resize_channels(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize `[H, W, C]` values to a height and a width, each channel by itself, as Pillow does it."""
    pillow = load_pillow()
    filter_ = pillow.Resampling[interpolation.upper()]
    # Pillow resizes by (width, height)
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(pillow.fromarray(pixels).resize(size[::-1], filter_))
    channels = [pillow.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2])]
    return np.stack([np.asarray(one.resize(size[::-1], filter_)) for one in channels], axis=-1)


def check_picture(payload: bytes) -> None:
    """Decode every page of a picture, to see that this works.

    Raises:
        NoPicture: it cannot be decoded.
    """
    with _opened(payload) as image:
        is_paged = image.format == "TIFF"
        for page in range(getattr(image, "n_frames", 1) if is_paged else 1):
            if is_paged:
                image.seek(page)
            _pixels(image, 3)


def picture_px(payload: bytes) -> tuple[int, int]:
    """Height and width of the upright picture, from its header only.

    Raises:
        NoPicture: the header is not that of a picture.
    """
    with _opened(payload) as image:
        width, height = image.size
        # Pillow turns the pages of TIFF files itself
        is_lying = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if is_lying else (height, width)


def load_pillow() -> Any:
    """Pillow's `Image`.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images need the package Pillow; install it: pip install 'meristem[vision]'") from error
    return Image


@contextmanager
def _opened(payload: bytes) -> Iterator[Any]:
    pillow = load_pillow()
    if not payload:
        raise NoPicture("an image must be one that Pillow can read: it is empty, 0 bytes")
    with _explained(), pillow.open(io.BytesIO(payload)) as image:
        yield image


@contextmanager
def _explained() -> Iterator[None]:
    pillow = load_pillow()
    try:
        yield
    except UserError:
        raise
    except pillow.UnidentifiedImageError as error:
        raise NoPicture("an image must be one that Pillow can read: not in a known format") from error
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        reason = f"an image must have at most {2 * pillow.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against bombs"
        raise NoPicture(f"{reason}: {_line(error)}") from error
    except Exception as error:  # of a damaged file, a plug-in of Pillow may raise anything
        raise NoPicture(f"an image must be one that Pillow can read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data around a picture that is whole
        return 1


def _pixels(image: Any, num_channels: int) -> np.ndarray:
    """Values of the current page in 1 to 4 channels."""
    kind = image.format
    image.load()  # before the orientation is asked for: Pillow turns the pages of TIFF files while it loads them
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(load_pillow().Transpose[turn])
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in DEEP_FORMATS):
        grey = np.asarray(image).astype(np.float32) / np.float32(65535)
        colours = [grey] * (1 if num_channels < 3 else 3)
        return np.stack([*colours, *([np.ones_like(grey)] if num_channels in (2, 4) else [])], axis=-1)
    if image.mode in ("I", "F"):
        raise NoPicture(f"values of an image must have 8 or 16 bits; got 32 ({kind}, mode {image.mode})")
    if "transparency" in image.info and image.mode in ("P", "L", "RGB"):
        image = image.convert("RGBA")  # else Pillow warns, or forgets it
    if image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no other way out of it
    pixels = np.asarray(image.convert(MODES[num_channels]))
    return pixels.reshape(*pixels.shape[:2], num_channels)
