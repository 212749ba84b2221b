"""The options of a patch tokenizer, as a config says them."""

from collections.abc import Sequence

from meristem.errors import ConfigError
from meristem_domains.vision.patches import PatchTokenizer

CLASS = "<class>"


def tokenizer(
    image_px: int | Sequence[int] | None = 224,
    patch_px: int = 16,
    num_channels: int = 3,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    crop: str = "center",
    crop_frac: float = 1.0,
    interpolation: str = "bicubic",
    has_class: bool = True,
    num_registers: int = 0,
    max_patches: int | None = None,
) -> PatchTokenizer:
    """Cuts pictures into patches.

    Args:
        image_px: height and width that every picture is brought to, or one number for both; null for native
            resolution, where each keeps its size and shape.
        patch_px: side of a patch.
        num_channels: that pictures are brought to.
        mean: of the values between 0 and 1, which is subtracted; one for all channels, or one each.
        std: that the difference is divided by.
        crop: how a picture of another shape meets the size: `center` (what stands out is cut off), `squash` (it is
            bent) or `border` (the rest is filled with the mean).
        crop_frac: share of the resized picture that is cut out of its centre.
        interpolation: when a picture is resized.
        has_class: a class token before the patches.
        num_registers: tokens behind it that have no place.
        max_patches: of a picture at native resolution, 1024 where nothing is said; a larger one is shrunk.
    """
    if image_px is None:
        crop = "squash" if crop == "center" else crop
        max_patches = max_patches or 1024
        size = None
    else:
        sides = [image_px, image_px] if isinstance(image_px, int) else list(image_px)
        if len(sides) != 2:
            raise ConfigError(f"image_px must be one number, or a height and a width; got {sides}")
        size = (sides[0], sides[1])
    return PatchTokenizer(
        image_px=size,
        patch_px=patch_px,
        num_channels=num_channels,
        mean=_each(mean, num_channels),
        std=_each(std, num_channels),
        crop_frac=crop_frac,
        crop=crop,
        interpolation=interpolation,
        prefix=(*([CLASS] if has_class else []), *(f"<register{i}>" for i in range(num_registers))),
        mask="" if has_class or num_registers else "<mask>",
        max_patches=max_patches,
    )


def _each(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    return (float(value),) * count if isinstance(value, int | float) else tuple(value)
