"""From the file of a picture to features: those of timm behind its own transform, and back out to timm.

Every step is ours: decoding, resizing, cutting, standard values, patches, the trunk, the pool. Theirs are
`create_transform(**resolve_data_config(...))` and `forward_features` of the model that timm loads from the directory.
"""

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

import meristem
from meristem.api import LoadedModel
from meristem.cli.main import main
from meristem.inference.engine import TrunkRunner
from meristem_domains.vision.families.runners import load_timm
from meristem_domains.vision.patches import PatchTokenizer
from meristem_domains.vision.picture_sizes import resized_size
from meristem_domains.vision.pictures import read_pixels
from references import redraw

TOLERANCE = 1e-4
"""Of features of unit size behind a norm: fp32 rounds at 1e-7, and 12 layers multiply it by some hundreds."""

MODELS: dict[str, tuple[str, Mapping[str, Any], tuple[int, int]]] = {
    "vit_tiny": ("vit_tiny_patch16_224", {"num_classes": 7}, (160, 256)),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {"num_classes": 7}, (272, 144)),
    "dinov2, 4 registers, 2 layers": ("vit_small_patch14_reg4_dinov2", {"depth": 2}, (196, 322)),
    "siglip, attention pool, 2 layers of 192": (
        "vit_base_patch16_siglip_224",
        {"depth": 2, "embed_dim": 192, "num_heads": 6},
        (256, 176),
    ),
}
"""Architecture, arguments beside, and a height and a width that are not the model's own."""

DISTILLED, SIGLIP = "deit_tiny_distilled", "siglip, attention pool, 2 layers of 192"

Sizes = tuple[int, int] | None


@dataclass(frozen=True)
class Both:
    """A model as timm wrote it, and as `meristem import` read it.

    Attributes:
        theirs: a directory of timm.
        ours: model directories by the size of their pictures; None is the model's own.
        image_px: the other size.
    """

    theirs: Path
    ours: Mapping[Sizes, Path]
    image_px: tuple[int, int]


BothOf = Callable[[str], Both]


def run(*arguments: object) -> str:
    """A command that must not fail, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="session")
def both_of(tmp_path_factory: pytest.TempPathFactory) -> BothOf:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"reference seed={seed}")

    @cache
    def make(name: str) -> Both:
        architecture, arguments, image_px = MODELS[name]
        folder = tmp_path_factory.mktemp("pictures")
        # flatter than elsewhere: through 12 layers of sharp attention timm itself differs by more at another batch
        model = redraw(timm.create_model(architecture, **arguments), np.random.default_rng(seed), sharp=1.0)
        save_for_hf(model, folder / "theirs", safe_serialization=True)
        ours: dict[Sizes, Path] = {None: folder / "ours", image_px: folder / "other"}
        run("import", folder / "theirs", ours[None], "--skip-parity")
        run("import", folder / "theirs", ours[image_px], "--skip-parity", "--image-px", *image_px)
        return Both(folder / "theirs", ours, image_px)

    return make


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of several formats and shapes, none of them a square, with edges, slopes and noise."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("drawn")
    files = []
    for name, (height, width) in {"a.jpg": (301, 437), "b.png": (640, 371), "c.webp": (555, 830)}.items():
        rows, columns = np.mgrid[:height, :width]
        waves = [np.sin(rows / rng.uniform(3, 90) + columns / rng.uniform(3, 90)) for _ in range(3)]
        blocks = rng.random((9, 9, 3)).repeat(-(-height // 9), 0)[:height].repeat(-(-width // 9), 1)[:, :width]
        values = 0.5 + 0.3 * np.stack(waves, -1) + 0.5 * (blocks - 0.5) + rng.normal(0, 0.1, (height, width, 3))
        Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8)).save(folder / name, quality=90)
        files.append(folder / name)
    return files


def load_theirs(folder: Path, image_px: Sizes) -> nn.Module:
    """As timm loads a directory, with its table of positions stretched where the size is another."""
    if image_px is None:
        return load_timm(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=image_px).eval()


def their_pixels(model: nn.Module, files: list[Path], image_px: Sizes) -> torch.Tensor:
    asked = {} if image_px is None else {"input_size": (3, *image_px)}
    transform = timm.data.create_transform(**timm.data.resolve_data_config(asked, model=model))
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


@torch.inference_mode()
def their_features(model: nn.Module, files: list[Path], image_px: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows `[N, n, D]`, and the vector before the classifier."""
    rows = model.forward_features(their_pixels(model, files, image_px))
    return rows, model.forward_head(rows, pre_logits=True)


def our_rows(model: LoadedModel, files: list[Path]) -> torch.Tensor:
    """All rows `[N, n, D]`: special ones too, which no verb writes."""
    column = model.card.tokenizer.encode_values(files)
    found: dict[int, torch.Tensor] = {}
    for rows in TrunkRunner(model.model).run(column):
        found |= dict(zip(rows.records, rows.values[: rows.layout.num_tokens].split(list(rows.layout.lengths))))
    return torch.stack([found[row] for row in range(len(files))])


def embed(folder: Path, files: list[Path], output: Path, pool: str) -> list[torch.Tensor]:
    """What `meristem embed` writes of the files."""
    run("embed", folder, *files, "--output", output, "--precision", "fp32", "--pool", pool)
    values = meristem.read_embeddings(output)
    assert list(values.ids) == [str(file) for file in files]
    return [torch.from_numpy(np.asarray(values[row])) for row in range(len(files))]


def pre_logits(vectors: torch.Tensor, is_distilled: bool) -> torch.Tensor:
    """As timm gives it: of a distilled model the mean of the two rows that ours puts side by side."""
    return torch.stack(vectors.chunk(2, dim=-1)).mean(0) if is_distilled else vectors


def refuse_distance(ours: torch.Tensor, theirs: torch.Tensor, what: str = "rows") -> float:
    """The check that every model must pass and no mutant may."""
    distance = float((ours - theirs).abs().max())
    assert distance <= TOLERANCE, f"{what} differ by {distance:.1e}"
    return distance


def check(both: Both, is_native: bool, files: list[Path], tmp_path: Path) -> float:
    """Rows of a model directory, and what `meristem embed` writes with it, are timm's.

    Returns:
        The largest difference.
    """
    image_px = None if is_native else both.image_px
    folder, theirs = both.ours[image_px], load_theirs(both.theirs, image_px)
    rows, pooled = their_features(theirs, files, image_px)
    model = meristem.load(folder, device="cpu")
    ours = our_rows(model, files)
    worst = refuse_distance(ours, rows)
    for got, want in zip(embed(folder, files, tmp_path / "none", "none"), ours):
        assert torch.equal(got, want[model.card.tokenizer.num_special[0] :])
    if model.card.architecture.pool is not None:
        vectors = torch.stack(embed(folder, files, tmp_path / "own", "own"))
        worst = max(worst, refuse_distance(pre_logits(vectors, hasattr(theirs, "head_dist")), pooled, "vectors"))
    return worst


@pytest.mark.parametrize("is_native", [True, False], ids=["own size", "other size"])
@pytest.mark.parametrize("name", MODELS)
def test_features_of_a_picture_file_are_timms(
    name: str, is_native: bool, both_of: BothOf, drawn: list[Path], tmp_path: Path
) -> None:
    print(f"{check(both_of(name), is_native, drawn, tmp_path):.1e}")


@pytest.mark.shared
@pytest.mark.parametrize("is_native", [True, False], ids=["own size", "other size"])
@pytest.mark.parametrize("name", [DISTILLED, SIGLIP])
def test_features_of_photos_are_timms(
    name: str, is_native: bool, both_of: BothOf, shared_data: Path, tmp_path: Path
) -> None:
    files = sorted((shared_data / "images" / "photos").iterdir())
    assert len(files) == 5
    print(f"{check(both_of(name), is_native, files, tmp_path):.1e}")


CARRIED = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What timm prepares a picture by, beside its size."""


@pytest.mark.parametrize("is_native", [True, False], ids=["own size", "other size"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_reads_a_picture_in_timm_as_before(
    name: str, is_native: bool, both_of: BothOf, drawn: list[Path], tmp_path: Path
) -> None:
    both = both_of(name)
    image_px = None if is_native else both.image_px
    run("export", both.ours[image_px], tmp_path / "back", "--to", "timm", "--skip-parity")
    said = [json.loads((folder / "config.json").read_text()) for folder in (both.theirs, tmp_path / "back")]
    before, after = (config["pretrained_cfg"] for config in said)
    assert {key: after[key] for key in CARRIED} == {key: before[key] for key in CARRIED}
    assert after["input_size"] == ([3, *image_px] if image_px else before["input_size"])
    exported = load_timm(tmp_path / "back")
    # its own size now, which is not told again
    rows, pooled = their_features(exported, drawn, None)
    wanted = their_features(load_theirs(both.theirs, image_px), drawn, image_px)
    refuse_distance(rows, wanted[0])
    refuse_distance(pooled, wanted[1], "vectors")
    # and read once more, it is what it was
    again = meristem.load(tmp_path / "back", device="cpu")
    assert torch.equal(our_rows(again, drawn[:1]), our_rows(meristem.load(both.ours[image_px], "cpu"), drawn[:1]))


def resize_without_antialias(tokenizer: PatchTokenizer, pixels: np.ndarray, image_px: tuple[int, int]) -> np.ndarray:
    """As `interpolate` of torch does where it is not asked to look at all pixels."""
    size = resized_size(pixels.shape[:2], tokenizer.uncropped_px, tokenizer.crop)
    values = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    values = F.interpolate(values, size=size, mode=tokenizer.interpolation)
    return values[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def cut_one_beside(tokenizer: PatchTokenizer, pixels: np.ndarray, image_px: tuple[int, int]) -> np.ndarray:
    top, left = (max(round((got - wanted) / 2) - 1, 0) for got, wanted in zip(pixels.shape, image_px))
    return pixels[top : top + image_px[0], left : left + image_px[1]]


def read_bluest_first(payload: bytes, num_channels: int) -> np.ndarray:
    return read_pixels(payload, num_channels)[..., ::-1]


CHANGES: dict[str, Callable[[PatchTokenizer], PatchTokenizer]] = {
    "bilinear for bicubic": lambda t: replace(t, interpolation="bilinear"),
    "mean and std swapped": lambda t: replace(t, mean=t.std, std=t.mean),
    "mean of another library": lambda t: replace(t, mean=(0.5,) * 3, std=(0.5,) * 3),
    "nothing cropped": lambda t: replace(t, crop_frac=1.0),
    "bent to the size": lambda t: replace(t, crop="squash"),
    "one pixel less around": lambda t: replace(t, crop_frac=1.0, resize_px=tuple(n - 1 for n in t.uncropped_px)),
}

FAULTS: dict[str, tuple[str, Any]] = {
    "no antialias": ("meristem_domains.vision.patches.PatchTokenizer._resized", resize_without_antialias),
    "cut one pixel beside": ("meristem_domains.vision.patches.PatchTokenizer._cut", cut_one_beside),
    "blue before red": ("meristem_domains.vision.patches.read_pixels", read_bluest_first),
}


@pytest.mark.parametrize("is_native", [True, False], ids=["own size", "other size"])
@pytest.mark.parametrize("fault", [*CHANGES, *FAULTS])
def test_a_picture_prepared_otherwise_is_caught(
    fault: str, is_native: bool, both_of: BothOf, drawn: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = both_of(DISTILLED)
    image_px = None if is_native else both.image_px
    model = meristem.load(both.ours[image_px], device="cpu")
    theirs, _ = their_features(load_theirs(both.theirs, image_px), drawn, image_px)
    refuse_distance(our_rows(model, drawn), theirs)
    if fault in CHANGES:
        assert isinstance(model.card.tokenizer, PatchTokenizer)
        model.card = replace(model.card, tokenizer=CHANGES[fault](model.card.tokenizer))
    else:
        monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match="rows differ"):
        refuse_distance(our_rows(model, drawn), theirs)


def stretch_without_antialias(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    values = table.unflatten(0, old).permute(2, 0, 1)[None]
    return F.interpolate(values, size=new, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)


def size_by_whole_pixels(tokenizer: PatchTokenizer, image_px: tuple[int, int]) -> PatchTokenizer:
    """The share that is cut out is taken from the old size, where it was rounded."""
    scaled = [round(n * new / old) for n, new, old in zip(tokenizer.uncropped_px, image_px, tokenizer.fixed_px)]
    return replace(tokenizer, image_px=image_px, crop_frac=1.0, resize_px=(scaled[0], scaled[1]))


SIZE_FAULTS: dict[str, tuple[str, Any]] = {
    "positions without antialias": ("meristem.model.grid.resample_grid", stretch_without_antialias),
    "a share of whole pixels": ("meristem_domains.vision.patches.PatchTokenizer.of_size", size_by_whole_pixels),
}


@pytest.mark.parametrize("fault", [None, *SIZE_FAULTS])
def test_a_model_brought_to_another_size_otherwise_is_caught(
    fault: str | None, both_of: BothOf, drawn: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = both_of("vit_tiny")
    if fault is not None:
        monkeypatch.setattr(*SIZE_FAULTS[fault])
    model = meristem.load(both.ours[None], device="cpu", tokenizer={"image_px": both.image_px})
    theirs, _ = their_features(load_theirs(both.theirs, both.image_px), drawn, both.image_px)
    with pytest.raises(AssertionError, match="rows differ") if fault else contextlib.nullcontext():
        refuse_distance(our_rows(model, drawn), theirs)


def test_a_size_that_a_model_cannot_read_is_one_line(both_of: BothOf, tmp_path: Path) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(["import", str(both_of("vit_tiny").theirs), str(tmp_path / "out"), "--image-px", "100", "224"])
    assert code == 2
    assert err.getvalue().startswith("meristem: error: patch_px must divide the height and the width of image_px; ")
    assert not (tmp_path / "out").exists()
