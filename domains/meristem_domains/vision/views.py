"""Views of a picture in training: random crops, rotations, colours and erasing, by timm's transforms."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

from meristem.data.views import Views
from meristem.errors import ConfigError, require
from meristem.model.config.checks import require_frac
from meristem.types import Record
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.pictures import StandardImage, load_pillow, read_pixels

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class PictureViews(Views):
    """Random changes of a picture in training.

    A picture is shifted, turned and zoomed; then cropped; then flipped; then its colours are changed, by RandAugment or
    by a jitter. At last, parts of the standardised values are erased.

    Attributes:
        tokenizer: cuts the changed picture into patches.
        crop_scale: least and largest share of the area that a random crop takes, which is then resized to the size of
            all pictures; None for no random crop.
        shift_frac: largest shift, as a fraction of height and width.
        turn_degrees: largest rotation in degrees, to either side.
        zoom_frac: largest relative change of size, in either direction.
        flip: probability that left and right are exchanged.
        auto_augment: a policy in timm's words, such as `rand-m9-mstd0.5-inc1` (RandAugment, Cubuk 2019, arXiv
            1909.13719); empty for none.
        color_jitter: strength of random changes of brightness, contrast and saturation; not beside `auto_augment`.
        erase: probability that a rectangle is replaced by noise (Zhong 2017, arXiv 1708.04896).
        repeats: views of a picture in one pack (Hoffer 2020, arXiv 1901.09335); an epoch is longer by this factor.

    Raises:
        ConfigError: a value out of range, or pictures that cannot be changed in this way.
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
        if not isinstance(self.tokenizer, PatchTokenizer):
            raise ConfigError(f"data.views takes pictures; the model reads {self.tokenizer.kind}")
        channels, scale = self.tokenizer.num_channels, self.crop_scale
        got = f"{channels} (data.tokenizer.num_channels)"
        require(channels in (1, 3), "data.views takes pictures of 1 or 3 channels", got)
        for name in ("shift_frac", "zoom_frac"):
            require_frac(getattr(self, name), f"data.views.{name}")
        for name in ("flip", "erase"):
            require(0 <= getattr(self, name) <= 1, f"data.views.{name} must be in [0, 1]", getattr(self, name))
        for name in ("turn_degrees", "color_jitter"):
            require(getattr(self, name) >= 0, f"data.views.{name} must be 0 or more", getattr(self, name))
        require(self.repeats >= 1, "data.views.repeats must be 1 or more", self.repeats)
        if scale is not None:
            object.__setattr__(self, "crop_scale", tuple(scale))  # YAML gives lists
            if self.tokenizer.image_px is None:
                raise ConfigError("data.views.crop_scale needs pictures of one size; set data.tokenizer.image_px")
            is_scale = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
            require(is_scale, "data.views.crop_scale must be a least and a most share above 0", list(scale))
        if self.auto_augment and self.color_jitter:
            raise ConfigError("data.views.color_jitter has no effect beside auto_augment; set one of them")
        assert self._made  # says now what is wrong with it

    @property
    def num_views(self) -> int:  # type: ignore[override]
        return self.repeats

    def views(self, record: Record, rng: np.random.Generator | None) -> tuple[Record, ...]:
        if rng is None:
            return (record,)
        assert isinstance(record.payload, bytes)
        pixels = read_pixels(record.payload, self.tokenizer.num_channels)
        if pixels.dtype != np.uint8:  # transforms know 8 bits alone
            pixels = np.rint(pixels * 255).astype(np.uint8)
        image = load_pillow().fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        change, erase, tokenizer = self._made
        found = []
        for _ in range(self.repeats):
            with drawn_from(rng):
                view = tokenizer.standardised(np.atleast_3d(np.asarray(change(image))))
                if erase is not None:
                    values = torch.from_numpy(np.ascontiguousarray(view.values.transpose(2, 0, 1)))
                    view = StandardImage(erase(values).numpy().transpose(1, 2, 0))
            found.append(record.with_payload(view))
        return tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the transforms, which each worker builds anew."""
        return {name: value for name, value in vars(self).items() if name != "_made"}

    @cached_property
    def _made(self) -> tuple[Change, Change | None, PatchTokenizer]:
        """The transforms of a picture, that of its standardised values, and the tokenizer of the result."""
        try:
            from timm.data import create_transform
            from timm.data.auto_augment import posterize
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
        for one in colours.transforms:
            for op in chain(getattr(one, "ops", ()), *getattr(one, "policy", ())):
                if op.aug_fn is posterize:
                    # at the strongest level timm 1.0.31 asks for no bit at all, which Pillow 13 refuses
                    op.aug_fn = lambda image, bits, **_: posterize(image, max(bits, 1))
        if self.crop_scale is not None:
            changes.append(crop)
            tokenizer = replace(tokenizer, resize_px=None, crop_frac=1.0)  # it is cut to its size
        if self.flip:
            changes.append(transforms.RandomHorizontalFlip(self.flip))
        changes.append(colours)
        erase = RandomErasing(self.erase, mode="pixel", device="cpu") if self.erase else None
        return transforms.Compose(changes), erase, tokenizer


@contextmanager
def drawn_from(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global random generators of Python, NumPy and torch from `rng`, and restore their states afterwards."""
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
