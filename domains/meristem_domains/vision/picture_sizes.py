"""The size of an image before it is cropped and cut into patches."""

import math

CROPS = ("center", "squash", "border")
"""How an image of another shape is resized to `resize_px`: it covers that size, and the rest is cut off; its shape is
changed; or it fits into that size, and the rest is filled with the mean."""


def resized_px(image_px: tuple[int, int], crop_frac: float) -> tuple[int, int]:
    """The size of which `image_px` is the fraction `crop_frac` (timm's `crop_pct`)."""
    return math.floor(image_px[0] / crop_frac), math.floor(image_px[1] / crop_frac)


def resized_size(size: tuple[int, ...], resize_px: tuple[int, int], crop: str) -> tuple[int, int]:
    """Height and width that an image of `size` is resized to for `resize_px`; `crop` is one of `CROPS`."""
    height, width = size[:2]
    if crop == "squash":
        return resize_px
    if crop == "center" and resize_px[0] == resize_px[1]:
        short = resize_px[0]  # the long side is rounded down here, and to the nearest below: as torchvision and timm do
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    ratios = height / resize_px[0], width / resize_px[1]
    ratio = max(ratios) if crop == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def native_px(size: tuple[int, ...], patch_px: int, max_patches: int) -> tuple[int, int]:
    """Height and width of an image at native resolution: its own, rounded down to multiples of a patch.

    An image of more than `max_patches` is shrunk. The shape is kept, except for the rounding.

    Args:
        size: height and width, each at least `patch_px`.
    """
    height, width = size[:2]
    scale = min(1.0, math.sqrt(max_patches * patch_px**2 / (height * width)))
    rows, columns = (max(1, int(scale * side / patch_px + 1e-9)) for side in (height, width))
    # of a stripe that is thinner than a patch when shrunk, one side was rounded up
    return min(rows, max_patches) * patch_px, min(columns, max_patches) * patch_px
