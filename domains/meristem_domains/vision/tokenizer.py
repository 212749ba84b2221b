"""The tokenizer options of a config."""

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
        image_px: height and width that every picture is resized to, or one number for both; null for native
            resolution, where each picture keeps its size and shape.
        patch_px: side of a patch.
        num_channels: number of channels that pictures are converted to.
        mean: number that is subtracted from values between 0 and 1; one for all channels, or one for each.
        std: number that the difference is divided by; one for all channels, or one for each.
        crop: how a picture of another shape is resized: `center` (the longer side is cut off), `squash` (its shape
            is changed) or `border` (the rest is filled with the mean).
        crop_frac: fraction of the resized picture's height and width that is cut out of its centre.
        interpolation: method of resizing.
        has_class: put a class token before the patches.
        num_registers: number of register tokens after the class token.
        max_patches: most patches of a picture at native resolution, 1024 by default; a larger picture is shrunk.
    """
    sides = (image_px, image_px) if isinstance(image_px, int) else image_px
    if sides is None:
        crop = "squash" if crop == "center" else crop
        max_patches = max_patches or 1024
    elif len(sides) != 2:
        raise ConfigError(f"image_px must be one number, or a height and a width; got {list(sides)}")
    return PatchTokenizer(
        image_px=sides,  # type: ignore[arg-type]
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
