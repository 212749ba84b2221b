"""Read and write `preprocessor_config.json`, the image preprocessing of `transformers`.

One step differs: where an odd number of pixels stands out, `transformers` cuts off the smaller half above and on the
left, and our tokenizer, as torchvision and timm, rounds the half to even. Such a picture is cut one pixel beside.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError, require
from meristem.files import read_json
from meristem.interop.settings import Settings
from meristem_domains.vision.patches import INTERPOLATIONS, PatchTokenizer

FILE = "preprocessor_config.json"

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of its filters."""

assert set(RESAMPLE) == set(INTERPOLATIONS)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pictures."""


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, given as two numbers or as one for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def side_of(found: Mapping[str, Any]) -> int:
    height, width = pair(found["patch_size"])
    require(height == width, "patch_size must be a square", f"{height} x {width}")
    return height


def patches_of(tokenizer: Tokenizer) -> PatchTokenizer:
    """The tokenizer, which must be one of patches.

    Raises:
        ConfigError: it is another one.
    """
    if not isinstance(tokenizer, PatchTokenizer):
        raise ConfigError(f"a model of images must have a tokenizer of patches; got {tokenizer.kind}")
    return tokenizer


def read_processor(folder: Path, found: Settings, has_mask: bool) -> tuple[PatchTokenizer, list[str]]:
    """Read the preprocessing of a directory as a tokenizer of patches; also returns notes for the user.

    Args:
        found: settings of the model; its positions are for images of `image_size`.

    Raises:
        CheckpointError: a file that is damaged.
        ConfigError: a step that no setting of ours can say.
    """
    image_px, num_channels = pair(found["image_size"]), found["num_channels"]
    file, notes = folder / FILE, []
    values = read_json(file, CheckpointError) if file.is_file() else {}
    if not file.is_file():
        notes.append(f"no {FILE}: pictures are bent to {image_px[0]} x {image_px[1]} px, with mean and std of 0.5")
    if not values.get("do_rescale", True) or abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{FILE} must divide by 255 (do_rescale, rescale_factor); it does not")
    is_standard = values.get("do_normalize", True)
    mean, std = (values.get(name, [0.5] * num_channels) for name in ("image_mean", "image_std"))
    resized, crop = _read_size(values)
    size = values.get("crop_size") if crop == "center" else None
    cut = (size["height"], size["width"]) if isinstance(size, Mapping) else image_px if size is None else (size, size)
    if cut != image_px:
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
        patch_px=side_of(found),
        num_channels=num_channels,
        mean=tuple(mean) if is_standard else (0.0,) * num_channels,
        std=tuple(std) if is_standard else (1.0,) * num_channels,
        resize_px=resized,
        crop=crop,
        interpolation=filters[number],
        prefix=("<class>", *(f"<register_{index}>" for index in range(1, found.get("num_register_tokens", 0) + 1))),
        mask="<mask>" if has_mask else "",
    )
    return tokenizer, notes


def write_processor(tokenizer: Tokenizer) -> dict[str, str]:
    """The text of `preprocessor_config.json`, by file name.

    Raises:
        ConfigError: a step that it cannot say, or a tokenizer of another kind.
    """
    patches = patches_of(tokenizer)
    values: dict[str, Any] = {
        "do_resize": True,
        "resample": RESAMPLE[patches.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(patches.mean),
        "image_std": list(patches.std),
    }
    height, width = patches.fixed_px
    resized = patches.uncropped_px
    if patches.crop == "squash" and resized == patches.fixed_px:
        values |= {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    elif patches.crop == "center" and resized[0] == resized[1]:
        values |= {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": resized[0]},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    else:
        raise ConfigError(
            f"{FILE} cannot say how pictures are brought to {height} x {width} px; got crop={patches.crop!r}, "
            f"resized to {list(resized)}; it knows squash to that size, and center from a square"
        )
    return {FILE: json.dumps(values, indent=2) + "\n"}


def _read_size(values: Mapping[str, Any]) -> tuple[tuple[int, int] | None, str]:
    size = values.get("size", values.get("shortest_edge"))
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if not values.get("do_center_crop", False):
        if shortest is not None:
            raise ConfigError(f"{FILE} must cut what stands out of size.shortest_edge (do_center_crop); it does not")
        return None, "squash"
    if shortest is None:
        raise ConfigError(f"{FILE} must resize by size.shortest_edge before it cuts; got {size!r}")
    return (shortest, shortest), "center"
