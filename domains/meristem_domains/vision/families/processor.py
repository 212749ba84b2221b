"""Read and write `preprocessor_config.json`, the image preprocessing of `transformers`.

One step differs: where an odd number of pixels stands out, `transformers` cuts off the smaller half above and on the
left, and our tokenizer, as torchvision and timm, rounds the half to even. Such a picture is cut one pixel beside.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meristem.errors import CheckpointError, ConfigError
from meristem.files import read_json
from meristem_domains.vision.patches import INTERPOLATIONS, PatchTokenizer

FILE = "preprocessor_config.json"

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of its filters."""

assert set(RESAMPLE) == set(INTERPOLATIONS)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pictures."""


def read_processor(
    folder: Path, image_px: tuple[int, int], patch_px: int, num_channels: int, prefix: Sequence[str], mask: str
) -> tuple[PatchTokenizer, list[str]]:
    """Read the preprocessing of a directory as a tokenizer of patches; also returns notes for the user.

    Args:
        image_px: height and width of the images that the model's positions are for.

    Raises:
        CheckpointError: a file that is damaged.
        ConfigError: a step that no setting of ours can say.
    """
    file, notes = folder / FILE, []
    values = read_json(file, CheckpointError) if file.is_file() else {}
    if not file.is_file():
        notes.append(f"no {FILE}: pictures are bent to {image_px[0]} x {image_px[1]} px, with mean and std of 0.5")
    if not values.get("do_rescale", True) or abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{FILE} must divide by 255 (do_rescale, rescale_factor); it does not")
    is_standard = values.get("do_normalize", True)
    mean, std = (values.get(name, [0.5] * num_channels) for name in ("image_mean", "image_std"))
    resized, crop = _read_size(values, image_px)
    if crop == "center" and (cut := _size(values.get("crop_size"), image_px)) != image_px:
        notes.append(
            f"{FILE} cuts pictures to {cut[0]} x {cut[1]} px, for which the reference stretches positions; "
            f"here they are read at {image_px[0]} x {image_px[1]} px, for which the positions were learned"
        )
        height, width = (round(side * own / other) for side, own, other in zip(resized or cut, image_px, cut))
        resized = height, width
    filters = {number: name for name, number in RESAMPLE.items()}
    if (number := values.get("resample", 2)) not in filters:
        raise ConfigError(f"{FILE}: resample must be one of {sorted(filters)}; got {number!r}")
    tokenizer = PatchTokenizer(
        image_px=image_px,
        patch_px=patch_px,
        num_channels=num_channels,
        mean=tuple(mean) if is_standard else (0.0,) * num_channels,
        std=tuple(std) if is_standard else (1.0,) * num_channels,
        resize_px=resized,
        crop=crop,
        interpolation=filters[number],
        prefix=tuple(prefix),
        mask=mask,
    )
    return tokenizer, notes


def write_processor(tokenizer: PatchTokenizer) -> str:
    """The text of `preprocessor_config.json`.

    Raises:
        ConfigError: a step that it cannot say.
    """
    values: dict[str, Any] = {
        "do_resize": True,
        "resample": RESAMPLE[tokenizer.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tokenizer.mean),
        "image_std": list(tokenizer.std),
    }
    height, width = tokenizer.fixed_px
    resized = tokenizer.uncropped_px
    if tokenizer.crop == "squash" and resized == tokenizer.fixed_px:
        values |= {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    elif tokenizer.crop == "center" and resized[0] == resized[1]:
        values |= {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": resized[0]},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    else:
        raise ConfigError(
            f"{FILE} cannot say how pictures are brought to {height} x {width} px; got crop={tokenizer.crop!r}, "
            f"resized to {list(resized)}; it knows squash to that size, and center from a square"
        )
    return json.dumps(values, indent=2) + "\n"


def _read_size(values: Mapping[str, Any], image_px: tuple[int, int]) -> tuple[tuple[int, int] | None, str]:
    size = values.get("size", values.get("shortest_edge"))
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if not values.get("do_center_crop", False):
        if shortest is not None:
            raise ConfigError(f"{FILE} must cut what stands out of size.shortest_edge (do_center_crop); it does not")
        return None, "squash"
    if shortest is None:
        raise ConfigError(f"{FILE} must resize by size.shortest_edge before it cuts; got {size!r}")
    return (shortest, shortest), "center"


def _size(size: Any, default: tuple[int, int]) -> tuple[int, int]:
    if size is None:
        return default
    return (size["height"], size["width"]) if isinstance(size, Mapping) else (size, size)
