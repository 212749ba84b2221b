"""Encoded pictures to pixels: what Pillow reads, upright, in as many channels as are asked for.

A file of several frames (GIF) or pages (TIFF) is its first one; where more than four channels are asked for, each page
of a TIFF file is one of them. Colours under transparent pixels are as the file has them, when no alpha is asked for.
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
"""Endings of names of pictures, lower case."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""What a picture of one page is decoded to, by channels."""

DEEP_FORMATS = ("PNG", "PPM")
"""Formats whose values Pillow may give in 32 bits and which have 16."""

TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What makes a picture upright, by its EXIF orientation."""

ORIENTATION = 0x0112

_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")


class NoPicture(DataError):
    """Bytes that are no picture that can be used."""


@dataclass(frozen=True, eq=False)
class StandardImage:
    """A payload that has the size and the values that the trunk sees: it is cut into patches, and nothing else.

    Attributes:
        values: `[H, W, C]` float32, mean subtracted and divided by the deviation.
    """

    values: np.ndarray


class RefusedImage(RefusedSymbol):
    """A payload that is no image, or none that the tokenizer takes."""

    def __init__(self, row: int, reason: str):
        Exception.__init__(self, reason)
        self.row, self.offset, self.symbol = row, 0, ""


@contextmanager
def of_row(row: int) -> Iterator[None]:
    """Names the row of a column whose payload is no picture."""
    try:
        yield
    except NoPicture as error:
        raise RefusedImage(row, str(error)) from error


def payload_of(value: Any, row: int) -> Any:
    """A payload, an array or an image of Pillow, of what a program hands over."""
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
    """`[H, W, C]` values of a picture: bytes, or float32 between 0 and 1 where they have 16 bits.

    Raises:
        NoPicture: it cannot be decoded, or not to so many channels.
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
    """`[H, W, C]` values of an image of Pillow, as `read_pixels` gives them.

    Raises:
        NoPicture: it cannot be brought to so many channels.
    """
    with _explained():
        if num_channels not in MODES:
            raise NoPicture(
                f"an image of {num_channels} channels must be an array or a TIFF file; got an image of Pillow"
            )
        return _pixels(image, num_channels)


def check_picture(payload: bytes) -> None:
    """Decode a picture as any model may ask for it, and forget it.

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
    """Height and width of a picture when it is upright, from its header alone.

    Raises:
        NoPicture: the header is none of a picture.
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
    """The current page in `num_channels` of 1 to 4."""
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
