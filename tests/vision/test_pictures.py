"""Encoded pictures: every format and mode to the channels asked for, upright, and what is damaged is refused."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import ConfigError
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_sizes import native_px
from meristem_domains.vision.pictures import NoPicture, check_picture, looks_like_picture, picture_px, read_pixels

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}, "PPM": {}}


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colours(rng: np.random.Generator, height: int = 12, width: int = 20, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), np.uint8).squeeze()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_back(kind: str, rng: np.random.Generator):
    pixels = colours(rng)
    payload = saved(Image.fromarray(pixels), kind, **LOSSLESS[kind])
    np.testing.assert_array_equal(read_pixels(payload, 3), pixels)
    assert picture_px(payload) == (12, 20)
    check_picture(payload)
    assert kind in ("BMP", "PPM") or looks_like_picture(payload[:16])


def test_jpeg_is_what_pillow_makes_of_it(rng: np.random.Generator):
    payload = saved(Image.fromarray(colours(rng, 32, 48)), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    np.testing.assert_array_equal(read_pixels(payload, 3), expected)
    assert looks_like_picture(payload)


def test_of_a_gif_the_first_frame_is_read(rng: np.random.Generator):
    frames = [Image.fromarray(colours(rng)).quantize(200) for _ in range(3)]
    payload = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_pixels(payload, 3), np.asarray(frames[0].convert("RGB")))
    assert not np.array_equal(read_pixels(payload, 3), np.asarray(frames[1].convert("RGB")))
    # whether later frames are whole is nothing to us
    check_picture(payload[: len(payload) - 20])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_modes_are_brought_to_the_channels_asked_for(channels: int, rng: np.random.Generator):
    grey, rgb, rgba = colours(rng, channels=1), colours(rng), colours(rng, channels=4)
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    full = np.full((12, 20), 255, np.uint8)
    expected = {
        "L": (Image.fromarray(grey), [grey] * 3, full, grey),
        "RGB": (Image.fromarray(rgb), list(np.moveaxis(rgb, 2, 0)), full, luma),
        # colours under transparency stay, as in the evaluation of vision libraries
        "RGBA": (
            Image.fromarray(rgba),
            list(np.moveaxis(rgba[..., :3], 2, 0)),
            rgba[..., 3],
            np.asarray(Image.fromarray(rgba[..., :3]).convert("L")),
        ),
    }
    for image, three, alpha, one in expected.values():
        wanted = {1: [one], 2: [one, alpha], 3: three, 4: [*three, alpha]}[channels]
        got = read_pixels(saved(image, "PNG"), channels)
        np.testing.assert_array_equal(got, np.stack(wanted, axis=-1))


def test_palettes_are_looked_up_with_and_without_transparency(rng: np.random.Generator):
    image = Image.fromarray(colours(rng)).quantize(16)
    plain = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of a palette whose transparency is given in bytes
        for options in ({}, {"transparency": 3}, {"transparency": bytes(range(0, 256, 16))}):
            payload = saved(image, "PNG", **options)
            np.testing.assert_array_equal(read_pixels(payload, 3), plain)
            alpha = read_pixels(payload, 4)[..., 3]
            assert (alpha == 255).all() == (not options)
            check_picture(payload)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_depth(kind: str, rng: np.random.Generator):
    deep = rng.integers(0, 65536, (12, 20), np.uint16)
    payload = saved(Image.fromarray(deep), kind)
    for channels in (1, 3):
        got = read_pixels(payload, channels)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, np.repeat((deep / np.float32(65535))[..., None], channels, axis=2))
    assert (read_pixels(payload, 4)[..., 3] == 1).all()
    check_picture(payload)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused(mode: str, rng: np.random.Generator):
    values = rng.integers(0, 9, (12, 20)).astype(np.int32 if mode == "I" else np.float32)
    payload = saved(Image.fromarray(values), "TIFF")
    for action in (check_picture, lambda encoded: read_pixels(encoded, 3)):
        with pytest.raises(NoPicture, match="8 or 16 bits; got 32"):
            action(payload)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(kind: str, orientation: int, rng: np.random.Generator):
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = saved(Image.fromarray(colours(rng, 16, 24)), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB"))
    assert expected.shape[:2] == ((24, 16) if orientation > 4 else (16, 24))
    np.testing.assert_array_equal(read_pixels(payload, 3), expected)
    assert picture_px(payload) == expected.shape[:2]


@pytest.mark.parametrize("count", [5, 7])
def test_pages_of_tiff_files_are_channels_where_more_than_four_are_asked_for(count: int, rng: np.random.Generator):
    pages = [colours(rng, channels=1) for _ in range(count)]
    images = [Image.fromarray(page) for page in pages]
    payload = saved(images[0], "TIFF", save_all=True, append_images=images[1:])
    np.testing.assert_array_equal(read_pixels(payload, count), np.stack(pages, axis=-1))
    np.testing.assert_array_equal(read_pixels(payload, 1)[..., 0], pages[0])
    with pytest.raises(NoPicture, match=f"6 channels must have so many pages of one channel each; got {count} page"):
        read_pixels(payload, 6)
    with pytest.raises(NoPicture, match="5 channels"):
        read_pixels(saved(Image.fromarray(colours(rng)), "PNG"), 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_picture_cut_off_anywhere_is_refused_or_whole(kind: str, rng: np.random.Generator):
    whole = saved(Image.fromarray(colours(rng, 40, 40)), kind)
    for cut in sorted(rng.integers(0, int(len(whole) * 0.9), 12)):
        with pytest.raises(NoPicture) as caught:
            check_picture(whole[:cut])
        assert "\n" not in str(caught.value)


def test_damaged_bytes_never_raise_anything_else(rng: np.random.Generator):
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        whole = np.frombuffer(saved(Image.fromarray(colours(rng, 24, 24)), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 400), rng.integers(1, 9))] = rng.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged EXIF data, and the like
                try:
                    check_picture(damaged.tobytes())
                except NoPicture:
                    continue
                read_pixels(damaged.tobytes(), 3)
                picture_px(damaged.tobytes())


def bomb(side: int = 20_000) -> bytes:
    """A PNG file of few bytes that says it has 400 million pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_what_is_no_picture_is_said_in_one_line():
    for payload, said in (
        (b"", "it is empty, 0 bytes"),
        (b"a text, whatever its name says\n", "not in a known format"),
        (bomb(), r"at most 178,956,970 pixels, Pillow's limit.*400000000 pixels"),
    ):
        for action in (check_picture, picture_px, lambda encoded: read_pixels(encoded, 3)):
            with pytest.raises(NoPicture, match=said) as caught:
                action(payload)
            assert "\n" not in str(caught.value)


def test_native_sizes_are_multiples_of_a_patch_within_the_limit(rng: np.random.Generator):
    for _ in range(300):
        patch, most = int(rng.integers(1, 33)), int(rng.integers(1, 600))
        height, width = (int(side) for side in rng.integers(patch, 3000, 2))
        rows, columns = (side / patch for side in native_px((height, width), patch, most))
        assert rows == int(rows) >= 1
        assert columns == int(columns) >= 1
        assert rows * columns <= most
        if (height // patch) * (width // patch) <= most and height * width <= most * patch**2:
            assert (rows, columns) == (height // patch, width // patch)  # as it is
        elif min(rows, columns) > 1:  # no more is lost than rounding down takes
            shrunk = np.sqrt(most * patch**2 / (height * width))
            assert (rows, columns) == (int(shrunk * height / patch + 1e-9), int(shrunk * width / patch + 1e-9))
    assert native_px((16, 16 * 1000), 16, 50) == (16, 800)


def native(patch_px: int = 4, max_patches: int = 60, **options: object) -> PatchTokenizer:
    return PatchTokenizer(None, patch_px, crop="squash", max_patches=max_patches, **options)


def test_at_native_resolution_each_image_keeps_its_size(rng: np.random.Generator):
    tokenizer = native(prefix=("<class>",))
    images = [colours(rng, height, width) for height, width in ((8, 12), (20, 16), (4, 40))]
    column = tokenizer.encode_column(pa.array([saved(Image.fromarray(image), "PNG") for image in images]))
    assert column.lengths.tolist() == [1 + 6, 1 + 20, 1 + 10]
    for row, image in enumerate(images):
        tokens = tokenizer.tokens_at(column, row)
        back = tokenizer.decode(tokens)
        np.testing.assert_array_equal((back * 255).round().astype(np.uint8), image)
        assert tokens.positions[1:].max(axis=0).tolist() == [image.shape[0] // 4 - 1, image.shape[1] // 4 - 1]
        # the slow way: each patch by itself
        for token in range(1, len(tokens)):
            top, left = 4 * tokens.positions[token]
            patch = image[top : top + 4, left : left + 4].transpose(2, 0, 1).reshape(-1)
            np.testing.assert_allclose(tokens.features[token], (patch / 255 - 0.5) / 0.5, atol=1e-6)  # two roundings
    large = tokenizer.encode(colours(rng, 400, 100))
    assert len(large) - 1 <= 60
    assert tokenizer.encode(colours(rng, 9, 11)).positions.max(axis=0).tolist() == [1, 1]


def test_lengths_are_those_of_the_tokens_and_refuse_what_the_tokenizer_refuses(rng: np.random.Generator):
    for tokenizer in (native(), PatchTokenizer((16, 24), 4), native(num_channels=1, mean=(0.5,), std=(0.5,))):
        payloads = pa.array([saved(Image.fromarray(colours(rng, *rng.integers(4, 60, 2))), "PNG") for _ in range(9)])
        np.testing.assert_array_equal(tokenizer.lengths(payloads), tokenizer.encode_column(payloads).lengths)
        assert (tokenizer.length_of(np.zeros(len(payloads))) >= tokenizer.lengths(payloads)).all()
        small = saved(Image.fromarray(colours(rng, 3, 9)), "PNG")
        for action in (tokenizer.lengths, tokenizer.encode_column):
            with pytest.raises(RefusedSymbol, match="a patch or more high and wide, 4 px; got 3 x 9") as caught:
                action(pa.array([*payloads.to_pylist(), small]))
            assert caught.value.row == 9


def test_what_a_program_hands_over_is_read_as_its_file_is(rng: np.random.Generator, tmp_path: Path):
    tokenizer = PatchTokenizer((16, 16), 8)
    pixels = colours(rng, 16, 16)
    image = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    path.write_bytes(saved(image, "PNG"))
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    column = tokenizer.encode_values([path, str(path), path.read_bytes(), image, pixels, pixels / 255, tensor])
    for row in range(7):
        got = tokenizer.tokens_at(column, row).features
        np.testing.assert_allclose(got, tokenizer.encode(pixels).features, atol=1e-6)  # two roundings of fp32
    for wrong, said in (
        (tmp_path / "b.png", r"b\.png: cannot be read: No such file"),
        (tmp_path, "cannot be read"),
        (pixels.astype(np.int64), "uint8, uint16, or floats between 0 and 1; got int64 from"),
        (pixels * 1.0, "floats between 0 and 1; got float64 from"),
        (np.full((16, 16, 3), np.nan), "floats between 0 and 1"),
        (pixels[..., 0], r"\[height, width, 3\]; got \[16, 16\]"),
        (7, "a path, encoded bytes, an image of Pillow, an array .* or a tensor .*; got int"),
    ):
        with pytest.raises(RefusedSymbol, match=said) as caught:
            tokenizer.encode_values([path, wrong])
        assert caught.value.row == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_patches": None}, "one of image_px and max_patches"),
        ({"image_px": (8, 8)}, "one of image_px and max_patches"),
        ({"max_patches": 0}, "max_patches must be 1 or more"),
        ({"crop": "center"}, "not cropped"),
        ({"resize_px": (8, 8)}, "not cropped"),
    ],
)
def test_settings_that_native_resolution_has_not_are_refused(values: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        PatchTokenizer(**{"image_px": None, "patch_px": 4, "crop": "squash", "max_patches": 9, **values})


def test_another_size_keeps_the_share_that_is_cropped():
    tokenizer = PatchTokenizer((224, 224), 16, resize_px=(256, 256))
    other = tokenizer.of_size((448, 224))
    assert (other.image_px, other.resize_px) == ((448, 224), (512, 256))
    with pytest.raises(ConfigError, match="divide"):
        tokenizer.of_size((225, 224))
    with pytest.raises(ConfigError, match="of one size"):
        native().of_size((8, 8))
