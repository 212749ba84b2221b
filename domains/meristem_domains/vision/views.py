"""Views of a picture in training: crops, turns, colours and erased parts, by timm's transforms."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.errors import ConfigError
from meristem.types import Record
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.pictures import StandardImage, read_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class PictureViews(Views):
    """What `picture_views` makes; its arguments are explained there.

    The order: shift, turn and zoom; crop; flip; RandAugment or jitter of colours; then, of the standard values, parts
    that are erased.
    """

    is_training_only: ClassVar[bool] = True  # type: ignore[misc]

    tokenizer: PatchTokenizer
    crop_scale: tuple[float, float] | None = None
    shift_frac: float = 0.0
    turn_degrees: float = 0.0
    zoom_frac: float = 0.0
    flip: float = 0.0
    auto_augment: str = ""
    color_jitter: float = 0.0
    erase: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.tokenizer.num_channels not in (1, 3):
            raise ConfigError(
                f"data.views takes pictures of 1 or 3 channels; got {self.tokenizer.num_channels} "
                "(data.tokenizer.num_channels)"
            )
        for name in ("shift_frac", "zoom_frac"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"data.views.{name} must be in [0, 1); got {getattr(self, name)}")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.views.{name} must be in [0, 1]; got {getattr(self, name)}")
        for name in ("turn_degrees", "color_jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.views.{name} must be 0 or more; got {getattr(self, name)}")
        if self.repeats < 1:
            raise ConfigError(f"data.views.repeats must be 1 or more; got {self.repeats}")
        if self.crop_scale is not None:
            if self.tokenizer.image_px is None:
                raise ConfigError("data.views.crop_scale needs pictures of one size; set data.tokenizer.image_px")
            if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
                raise ConfigError(
                    f"data.views.crop_scale must be a least and a most share above 0; got {list(self.crop_scale)}"
                )
        if self.auto_augment and self.color_jitter:
            raise ConfigError("data.views.color_jitter has no effect beside auto_augment; set one of them")
        self._make()  # says now what is wrong with it

    @property
    def num_views(self) -> int:  # type: ignore[override]
        return self.repeats

    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        if rng is None:
            return (record,)
        assert isinstance(record.payload, bytes)
        image = _to_image(read_pixels(record.payload, self.tokenizer.num_channels))
        return tuple(record.with_payload(self._view(image, rng)) for _ in range(self.repeats))

    def _view(self, image: "Image", rng: np.random.Generator) -> StandardImage:
        change, erase, tokenizer = self._made
        with drawn_from(rng):
            view = tokenizer.standardised(_to_array(change(image)))
            return view if erase is None else _erased(view, erase)

    @cached_property
    def _made(self) -> tuple[Change, Change | None, PatchTokenizer]:
        return self._make()

    def __getstate__(self) -> dict[str, Any]:
        """Without the transforms, which a worker makes anew."""
        return {name: value for name, value in vars(self).items() if name != "_made"}

    def _make(self) -> tuple[Change, Change | None, PatchTokenizer]:
        """Changes of a picture, the change of its standard values, and the tokenizer of what comes out."""
        try:
            from timm.data import create_transform
            from timm.data.random_erasing import RandomErasing
            from torchvision import transforms
        except ImportError as error:
            raise ConfigError(
                "data.views needs the package timm; install it: pip install 'meristem[vision]'"
            ) from error
        tokenizer = self.tokenizer
        changes: list[Change] = []
        if self.shift_frac or self.turn_degrees or self.zoom_frac:
            changes.append(
                transforms.RandomAffine(
                    degrees=self.turn_degrees,
                    translate=(self.shift_frac, self.shift_frac),
                    scale=(1 - self.zoom_frac, 1 + self.zoom_frac),
                    interpolation=transforms.InterpolationMode.BILINEAR,
                    fill=0,
                )
            )
        try:
            crop, colours, _ = create_transform(
                tokenizer.image_px or 224,  # of the crop, which pictures of any size have not
                is_training=True,
                scale=self.crop_scale,
                hflip=0.0,
                color_jitter=self.color_jitter or None,  # type: ignore[arg-type]
                auto_augment=self.auto_augment or None,
                interpolation=tokenizer.interpolation
                if tokenizer.interpolation in ("bilinear", "bicubic")
                else "random",
                mean=tokenizer.mean,
                std=tokenizer.std,
                separate=True,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(
                "data.views.auto_augment must be a policy of timm, such as rand-m9-mstd0.5; "
                f"got {self.auto_augment!r} ({type(error).__name__}: {error})"
            ) from error
        if self.crop_scale is not None:
            changes.append(crop)
            tokenizer = replace(tokenizer, resize_px=None, crop_frac=1.0)  # it is cut to its size
        if self.flip:
            changes.append(transforms.RandomHorizontalFlip(self.flip))
        changes.append(colours)
        erase = RandomErasing(self.erase, mode="pixel", device="cpu") if self.erase else None
        return transforms.Compose(changes), erase, tokenizer


def picture_views(
    tokenizer: Tokenizer,
    crop_scale: Sequence[float] | None = None,
    shift_frac: float = 0.0,
    turn_degrees: float = 0.0,
    zoom_frac: float = 0.0,
    flip: float = 0.0,
    auto_augment: str = "",
    color_jitter: float = 0.0,
    erase: float = 0.0,
    repeats: int = 1,
) -> PictureViews:
    """Views of a picture in training.

    Args:
        tokenizer: cuts what comes out into patches.
        crop_scale: least and most share of the area that a random crop takes, which is then brought to the size of
            all; null for no such crop.
        shift_frac: of height and width, by which a picture is shifted at most.
        turn_degrees: by which it is turned at most, to either side.
        zoom_frac: by which it grows or shrinks at most.
        flip: chance that left and right change places.
        auto_augment: a policy in timm's words, such as `rand-m9-mstd0.5-inc1` (RandAugment, Cubuk 2019, arXiv
            1909.13719); empty for none.
        color_jitter: of brightness, contrast and saturation; where there is no `auto_augment`.
        erase: chance that a rectangle is overwritten with noise (Zhong 2017, arXiv 1708.04896).
        repeats: views of a picture in one pack (Hoffer 2020, arXiv 1901.09335); an epoch is so many times as long.

    Raises:
        ConfigError: a value out of range, or pictures that cannot be changed so.
    """
    if not isinstance(tokenizer, PatchTokenizer):
        raise ConfigError(f"data.views takes pictures; the model reads {tokenizer.kind}")
    return PictureViews(
        tokenizer,
        None if crop_scale is None else tuple(crop_scale),  # type: ignore[arg-type]
        shift_frac,
        turn_degrees,
        zoom_frac,
        flip,
        auto_augment,
        color_jitter,
        erase,
        repeats,
    )


@contextmanager
def drawn_from(rng: np.random.Generator) -> Iterator[None]:
    """Let the global generators of three libraries, which transforms draw from, follow `rng`; then put them back."""
    import torch

    seeds = rng.integers(2**32, size=3).tolist()
    of_python, of_torch = random.getstate(), torch.random.get_rng_state()
    of_numpy = np.random.get_state()  # noqa: NPY002 (it is what timm draws from)
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])  # noqa: NPY002
        torch.random.default_generator.manual_seed(seeds[2])
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.random.set_rng_state(of_torch)


def _to_image(pixels: np.ndarray) -> "Image":
    from PIL import Image

    if pixels.dtype != np.uint8:  # transforms know 8 bits alone
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _to_array(image: "Image") -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _erased(image: StandardImage, erase: Change) -> StandardImage:
    """With a part of the values changed."""
    import torch

    values = np.ascontiguousarray(image.values.transpose(2, 0, 1))
    return StandardImage(erase(torch.from_numpy(values)).numpy().transpose(1, 2, 0))
