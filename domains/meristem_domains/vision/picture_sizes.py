"""What an image is resized to before it is cut into patches."""

import math

CROPS = ("center", "squash", "border")
"""How an image meets `resize_px`: it covers it and what stands out is cut off; it is bent to it; it fits into it and
the rest is filled with the mean."""


def resized_px(image_px: tuple[int, int], crop_frac: float) -> tuple[int, int]:
    """What an image is resized to, so that `image_px` is `crop_frac` of it (timm's `crop_pct`)."""
    return math.floor(image_px[0] / crop_frac), math.floor(image_px[1] / crop_frac)


def resized_size(size: tuple[int, ...], resize_px: tuple[int, int], crop: str) -> tuple[int, int]:
    """Height and width that an image of `size` is resized to.

    Args:
        size: height and width.
        resize_px: height and width that it is to meet.
        crop: how, one of `CROPS`.
    """
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
    """Height and width that an image of `size` has at native resolution: multiples of a patch, rounded down.

    It is shrunk where it would have more than `max_patches`. Its shape is kept, but for the rounding.

    Args:
        size: height and width, a patch or more each.
    """
    height, width = size[:2]
    scale = min(1.0, math.sqrt(max_patches * patch_px**2 / (height * width)))
    rows, columns = (max(1, int(scale * side / patch_px + 1e-9)) for side in (height, width))
    # of a stripe that is thinner than a patch when shrunk, one side was rounded up
    return min(rows, max_patches) * patch_px, min(columns, max_patches) * patch_px
