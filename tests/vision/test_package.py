"""The package and the verb give one vector for one picture, however it is handed over; and sizes that are asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from small_runs import run, small_model

import meristem
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem_domains.vision import domain, patches
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_sizes import resized_px
from meristem_domains.vision.pictures import read_pixels


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def lying() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


Make = Callable[[np.ndarray, Path], Path]

KINDS: dict[str, Make] = {
    "jpg": lambda pixels, path: saved(Image.fromarray(pixels), path, quality=80),
    "png": lambda pixels, path: saved(Image.fromarray(pixels), path),
    "webp": lambda pixels, path: saved(Image.fromarray(pixels), path),
    "lying.jpg": lambda pixels, path: saved(Image.fromarray(pixels), path, exif=lying()),
    "palette.png": lambda pixels, path: saved(Image.fromarray(pixels).quantize(40), path),
    "palette.gif": lambda pixels, path: saved(
        Image.fromarray(pixels).quantize(40), path, save_all=True, append_images=[Image.fromarray(pixels[::-1])]
    ),
    "alpha.png": lambda pixels, path: saved(Image.fromarray(np.dstack([pixels, pixels[..., :1]])), path),
    "grey.png": lambda pixels, path: saved(Image.fromarray(pixels[..., 0]), path),
    "cmyk.jpg": lambda pixels, path: saved(Image.fromarray(pixels).convert("CMYK"), path),
    "bits.tiff": lambda pixels, path: saved(Image.fromarray(pixels[..., 0] > 99), path),
    "deep.png": lambda pixels, path: saved(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), path),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_gives_one_vector_however_it_is_handed_over(
    kind: str, model: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = KINDS[kind](rng.integers(0, 256, (40, 64, 3), np.uint8), tmp_path / f"a.{kind}")
    code, _, err = run("embed", model, path, "--output", tmp_path / "out", "--precision", "fp32")
    assert code == 0, err
    wanted = meristem.read_embeddings(tmp_path / "out").values[0]
    loaded = meristem.load(model, device="cpu")
    array = read_pixels(path.read_bytes(), 3)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        handed: list[Any] = [str(path), path, path.read_bytes(), image, upright, array]
        for value in handed:
            assert np.array_equal(loaded.embed([value], precision="fp32")[0], wanted), type(value)
        assert np.array_equal(loaded.embed(handed, precision="fp32"), np.stack([wanted] * len(handed)))
        if array.dtype == np.uint8:
            assert np.array_equal(array, np.asarray(upright.convert("RGB")))
    assert array.shape == ((64, 40, 3) if kind == "lying.jpg" else (40, 64, 3))


def test_the_package_writes_what_the_verb_writes(model: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    paths = [make(rng.integers(0, 256, (40, 64, 3), np.uint8), tmp_path / f"a.{kind}") for kind, make in KINDS.items()]
    assert run("embed", model, *paths, "--output", tmp_path / "verb", "--precision", "fp32")[0] == 0
    meristem.embed(model, paths, tmp_path / "package", precision="fp32")
    verb, package = (meristem.read_embeddings(tmp_path / name) for name in ("verb", "package"))
    assert list(verb.ids) == list(package.ids) == list(map(str, paths))
    assert np.array_equal(verb.values, package.values)
    assert np.array_equal(meristem.load(model, device="cpu").embed(paths, precision="fp32"), verb.values)


@pytest.mark.parametrize("kind", ["lying.jpg", "deep.png"])
def test_a_path_of_its_own_for_images_of_pillow_would_be_seen(
    kind: str, model: Path, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: what a program hands over is made bytes by `convert` and `asarray`, as in the usual examples."""
    path = KINDS[kind](rng.integers(0, 256, (40, 64, 3), np.uint8), tmp_path / f"a.{kind}")
    loaded = meristem.load(model, device="cpu")
    wanted = loaded.embed([path], precision="fp32")
    monkeypatch.setattr(patches, "pixels_of", lambda image, channels: np.asarray(image.convert("RGB")))
    with Image.open(path) as image:
        assert not np.array_equal(loaded.embed([image], precision="fp32"), wanted)


# --- sizes -----------------------------------------------------------------------------------------------------


def test_a_share_is_kept_at_every_size(rng: np.random.Generator) -> None:
    """What is resized to is rounded once, from the share, and not again from the rounded number of another size."""
    tokenizer = PatchTokenizer((224, 224), 16, crop_frac=0.9)
    assert tokenizer.uncropped_px == (248, 248)
    differs = 0
    for _ in range(200):
        size = tuple(int(side) * 16 for side in rng.integers(2, 40, 2))
        other = tokenizer.of_size(size)  # type: ignore[arg-type]
        assert (other.image_px, other.crop_frac, other.resize_px) == (size, 0.9, None)
        assert other.uncropped_px == resized_px(size, 0.9)  # type: ignore[arg-type]
        differs += other.uncropped_px != tuple(round(248 * side / 224) for side in size)
    assert differs > 100, "the mutant, which scales the rounded number, must be seen"


def test_a_share_is_that_of_the_pixels_that_it_gives(rng: np.random.Generator) -> None:
    picture = rng.integers(0, 256, (50, 70, 3), np.uint8)
    by_share = PatchTokenizer((32, 48), 8, crop_frac=0.875)
    by_size = PatchTokenizer((32, 48), 8, resize_px=resized_px((32, 48), 0.875))
    whole = PatchTokenizer((32, 48), 8)
    assert np.array_equal(by_share.encode(picture).features, by_size.encode(picture).features)
    assert not np.array_equal(by_share.encode(picture).features, whole.encode(picture).features)


def test_a_share_travels_with_the_model_and_directories_without_one_stay_valid() -> None:
    tokenizer = PatchTokenizer((32, 32), 8, crop_frac=0.9)
    assert PatchTokenizer.from_json(tokenizer.to_json()) == tokenizer
    assert tokenizer.fingerprint != replace(tokenizer, crop_frac=0.95).fingerprint
    whole = replace(tokenizer, crop_frac=1.0)
    assert "crop_frac" not in whole.to_json()
    assert PatchTokenizer.from_json(whole.to_json()) == whole


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"crop_frac": 0.0}, "crop_frac must be above 0 and at most 1; got 0.0"),
        ({"crop_frac": 1.5}, "crop_frac must be above 0 and at most 1"),
        ({"crop_frac": 0.9, "resize_px": (36, 36)}, r"one of resize_px and crop_frac must be set; got \[36, 36\]"),
        ({"crop_frac": 0.9, "image_px": None, "max_patches": 9, "crop": "squash"}, "not cropped: .*crop_frac 1"),
    ],
)
def test_shares_that_cannot_work_are_refused(values: dict[str, Any], said: str) -> None:
    given = {"image_px": (32, 32), "patch_px": 8, **values}
    with pytest.raises(ConfigError, match=said):
        PatchTokenizer(**given)
    with pytest.raises(CheckpointError, match=said):
        PatchTokenizer.from_json(given)


def test_a_model_is_trained_on_with_the_size_and_the_crop_that_are_asked_for() -> None:
    own = PatchTokenizer((32, 32), 8, resize_px=(40, 40))
    for options, wanted in [
        ({"image_px": [64, 32], "crop": "border", "crop_frac": 0.9}, {"crop": "border", "crop_frac": 0.9}),
        ({"image_px": [64, 32]}, {"resize_px": (80, 40)}),
        ({"crop_frac": 0.9}, {"image_px": (32, 32), "crop_frac": 0.9}),
        ({"image_px": None, "max_patches": 50}, {"image_px": None, "crop": "squash", "max_patches": 50}),
        ({}, {"image_px": (32, 32), "resize_px": (40, 40)}),
        (
            {"image_px": 24, "patch_px": 8, "mean": 0.5},
            {"image_px": (24, 24), "resize_px": (30, 30)},
        ),
    ]:
        values = {"image_px": (64, 32), "patch_px": 8, **wanted}
        assert own.adapted(domain.build_tokenizer, options) == PatchTokenizer(**values)
    for name, value in {"interpolation": "box", "std": 0.1, "patch_px": 16}.items():
        with pytest.raises(ConfigError, match=f"tokenizer option {name} must be .*, as of the model; got "):
            own.adapted(domain.build_tokenizer, {name: value})
    for more, got in ({"num_registers": 2}, 3), ({"has_class": False}, 0):
        with pytest.raises(ConfigError, match=f"num_registers must give 1 special rows, as of the model; got {got}"):
            own.adapted(domain.build_tokenizer, more)


def test_a_size_that_only_the_patches_of_the_model_divide_is_taken() -> None:
    own = PatchTokenizer((28, 28), 14, prefix=("<class>", "<register_1>"))
    assert own.adapted(domain.build_tokenizer, {"image_px": 42}) == replace(own, image_px=(42, 42))
    with pytest.raises(ConfigError, match="patch_px must divide"):
        own.adapted(domain.build_tokenizer, {"image_px": 32})


def test_what_is_shown_is_one_line(model: Path, tmp_path: Path) -> None:
    """A path that is no picture, from the package: the sequence, the path, and why."""
    (tmp_path / "a.jpg").write_text("a text")
    loaded = meristem.load(model, device="cpu")
    with pytest.raises(DataError, match=r"^sequence 1: .*a\.jpg: an image must be one that Pillow") as caught:
        loaded.embed([np.zeros((20, 20, 3), np.uint8), tmp_path / "a.jpg"])
    assert "\n" not in str(caught.value)
