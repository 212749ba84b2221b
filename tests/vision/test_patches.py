"""Patches: pixels equal to timm's and to Hugging Face's, features in the order of a convolution, and back."""

import io
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from meristem.data.pack import pack_column
from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.registry import find
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_sizes import resized_px

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth and noisy parts, black and white ones."""
    coarse = rng.random((4, 4, channels)).repeat(-(-height // 4), 0)[:height].repeat(-(-width // 4), 1)[:, :width]
    noise = rng.random((height, width, channels))
    return (255 * np.clip(coarse + (noise - 0.5) * rng.random(), 0, 1)).round().astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    image = Image.fromarray(pixels.squeeze())
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind)
    return stream.getvalue()


def chw(tokenizer: PatchTokenizer, payload: bytes | np.ndarray) -> np.ndarray:
    """Standard values `[C, H, W]` as the tokens hold them, put together by a slow loop."""
    tokens = tokenizer.encode(payload)
    side = tokenizer.patch_px
    out = np.full((tokenizer.num_channels, *tokenizer.image_px), np.nan, np.float32)
    for i in range(len(tokens)):
        row, column = tokens.positions[i]
        if tokens.ids[i] < 0:
            patch = tokens.features[i].reshape(tokenizer.num_channels, side, side)
            out[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
    return out


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("crop_frac", [0.9, 1.0, 0.875])
def test_pixels_are_those_of_timms_evaluation(
    interpolation: str, crop: str, size: tuple[int, int], crop_frac: float, rng: np.random.Generator
):
    transform = create_transform(
        (3, *size),
        is_training=False,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_frac,
        crop_mode=crop,
    )
    tokenizer = PatchTokenizer(
        size, 8, mean=MEAN, std=STD, resize_px=resized_px(size, crop_frac), crop=crop, interpolation=interpolation
    )
    for _ in range(6):
        pixels = picture(rng, *rng.integers(9, 90, 2))
        expected = transform(Image.fromarray(pixels)).numpy()
        for payload in (pixels, encoded(pixels)):
            # the same bytes come out of Pillow; the rest is one division and one subtraction in fp32
            np.testing.assert_allclose(chw(tokenizer, payload), expected, rtol=0, atol=1e-5)


def test_pixels_are_those_of_hugging_face(rng: np.random.Generator):
    for size in ((32, 32), (16, 48)):
        processor = ViTImageProcessorPil(size={"height": size[0], "width": size[1]})
        tokenizer = PatchTokenizer(size, 8, crop="squash", interpolation="bilinear")
        for _ in range(6):
            pixels = picture(rng, *rng.integers(9, 90, 2))
            expected = np.asarray(processor(Image.fromarray(pixels))["pixel_values"][0])
            # they scale by 1/255 in fp64 and round later
            np.testing.assert_allclose(chw(tokenizer, pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"interpolation": "bilinear"}, {"crop": "squash"}, {"resize_px": (33, 33)}, {"std": (0.2, 0.2, 0.2)}]
)
def test_another_setting_would_be_seen(change: dict[str, Any], rng: np.random.Generator):
    tokenizer = PatchTokenizer((32, 32), 8, mean=MEAN, std=STD)
    pixels = picture(rng, 50, 70)
    assert np.abs(chw(replace(tokenizer, **change), pixels) - chw(tokenizer, pixels)).max() > 1e-3


@pytest.mark.parametrize(("image_px", "patch_px", "channels"), [((24, 40), 8, 3), ((12, 6), 3, 1), ((8, 8), 4, 5)])
def test_features_are_in_the_order_of_a_convolution(
    image_px: tuple[int, int], patch_px: int, channels: int, rng: np.random.Generator
):
    tokenizer = PatchTokenizer(
        image_px, patch_px, channels, (0.4,) * channels, (0.3,) * channels, prefix=("<class>", "<r0>", "<r1>")
    )
    pixels = picture(rng, *image_px, channels)
    tokens = tokenizer.encode(pixels)
    conv = torch.nn.Conv2d(channels, 7, patch_px, stride=patch_px)
    values = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.4) / 0.3
    expected = conv(values[None])[0].flatten(1).T
    got = torch.from_numpy(tokens.features[3:]) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # sums of fp32 in another order
    assert tokens.ids.tolist() == [0, 1, 2] + [-1] * (len(tokens) - 3)
    rows, columns = tokenizer.grid
    places = [[row, column] for row in range(rows) for column in range(columns)]
    assert tokens.positions.tolist() == [[-1, -1]] * 3 + places
    assert not tokens.features[:3].any()


def test_decoding_gives_the_image_back(rng: np.random.Generator):
    tokenizer = PatchTokenizer((16, 24), 8, mean=MEAN, std=STD)
    pixels = picture(rng, 16, 24)
    image = tokenizer.decode(tokenizer.encode(encoded(pixels)))
    np.testing.assert_array_equal((image * 255).round().astype(np.uint8), pixels)
    again = tokenizer.encode(image)  # floats between 0 and 1 are images, too
    np.testing.assert_allclose(again.features, tokenizer.encode(pixels).features, atol=1e-5)  # two roundings of fp32
    resized = tokenizer.decode(tokenizer.encode(picture(rng, 40, 50)))
    assert resized.shape == (16, 24, 3)


def test_floats_are_resized_as_bytes_are(rng: np.random.Generator):
    tokenizer = PatchTokenizer((16, 16), 8, interpolation="bilinear")  # which stays between 0 and 1
    pixels = picture(rng, 30, 50)
    ours = tokenizer.encode(pixels.astype(np.float64) / 255).features
    # bytes are rounded twice on the way, once for each direction, and std is 0.5
    np.testing.assert_allclose(ours, tokenizer.encode(pixels).features, atol=2 * 2.01 / 255)


def test_columns_equal_single_images_and_are_packed(rng: np.random.Generator):
    tokenizer = PatchTokenizer((16, 16), 8, prefix=("<class>",))
    images = [encoded(picture(rng, *rng.integers(9, 60, 2)), kind) for kind in ("PNG", "BMP", "TIFF", "PNG")]
    column = tokenizer.encode_column(pa.chunked_array([pa.array(images[:1]), pa.array(images[1:])]))
    for row, image in enumerate(images):
        tokens, single = tokenizer.tokens_at(column, row), tokenizer.encode(image)
        for name in ("ids", "positions", "features"):
            np.testing.assert_array_equal(getattr(tokens, name), getattr(single, name))
    batch = pack_column(column, np.arange(4), range(4))
    assert batch.layout.lengths == (5,) * 4
    assert batch.features.shape == (20, 192)
    assert len(tokenizer.encode_column(pa.array([], pa.binary()))) == 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_other_modes_become_those_of_three_channels(mode: str, rng: np.random.Generator):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    payload = encoded(picture(rng, 20, 20), kind, mode)
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    tokenizer = PatchTokenizer((16, 16), 8)
    np.testing.assert_array_equal(tokenizer.encode(payload).features, tokenizer.encode(expected).features)
    grey = PatchTokenizer((16, 16), 8, 1, (0.5,), (0.5,))
    assert grey.encode(payload).features.shape == (5, 64)


def test_what_is_no_image_is_refused_by_row(rng: np.random.Generator):
    tokenizer = PatchTokenizer((16, 16), 8)
    whole = encoded(picture(rng, 40, 40))
    for damaged in (b"no image", b"", whole[: len(whole) // 2]):
        with pytest.raises(RefusedSymbol, match="Pillow can read") as caught:
            tokenizer.encode_column(pa.array([whole, damaged]))
        assert caught.value.row == 1
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"\[height, width, 3\]; got \[16, 16, 4\]"):
        tokenizer.encode(np.zeros((16, 16, 4), np.uint8))
    with pytest.raises(DataError, match="missing"):
        tokenizer.encode_column(pa.array([whole, None]))


def test_writing_and_reading_keeps_the_tokenizer(rng: np.random.Generator):
    tokenizer = PatchTokenizer((16, 24), 8, mean=MEAN, std=STD, resize_px=(18, 27), mask="<mask>")
    again = find("meristem.tokenizers", "patches").from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab, again.mask_id, again.num_special) == (("<class>", "<mask>"), 1, (1, 0))
    assert not len(again.random_ids)
    changes = {"mean": STD, "interpolation": "box", "crop": "border", "resize_px": None, "prefix": (), "patch_px": 4}
    prints = {replace(tokenizer, **{name: value}).fingerprint for name, value in changes.items()}
    assert len(prints | {tokenizer.fingerprint}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"patch_px": 5}, "patch_px must divide"),
        ({"image_px": (16,)}, "image_px must be a height and a width"),
        ({"resize_px": (0, 5)}, "resize_px must be"),
        ({"num_channels": 1}, "one value for each of 1 channels"),
        ({"std": (0, 1, 1)}, "std must be above 0"),
        ({"crop": "five"}, "center, squash, border"),
        ({"interpolation": "random"}, "nearest, bilinear"),
        ({"prefix": ("<a>", "<a>")}, "once"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        PatchTokenizer(**{"image_px": (16, 16), "patch_px": 8, **values})
    with pytest.raises(CheckpointError, match="patches"):
        PatchTokenizer.from_json({"image_px": [16, 16], "patch_px": 8, **values})


def test_without_pillow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    monkeypatch.setitem(sys.modules, "PIL", None)
    tokenizer = PatchTokenizer((16, 16), 8)
    tokenizer.encode(picture(rng, 16, 16))  # of the right size already: nothing to resize
    with pytest.raises(ConfigError, match=r"meristem\[vision\]"):
        tokenizer.encode(picture(rng, 20, 20))
