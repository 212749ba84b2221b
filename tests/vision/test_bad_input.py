"""What is wrong with pictures, through the verbs: one line that names the file, exit code 2, nothing left behind."""

import csv
import io
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import classes, encoded, write_folder, write_tar
from PIL import Image, ImageFile
from small_runs import CONFIG, run, small_model

from meristem_domains.vision import reading
from meristem_domains.vision.pictures import check_picture, picture_px, read_pixels


def bomb(side: int = 20_000) -> bytes:
    """A PNG file of some hundred bytes that says it has 400 million pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def deep(rng: np.random.Generator) -> bytes:
    """A TIFF file of values of 32 bits, which no evaluation of pictures takes."""
    stream = io.BytesIO()
    Image.fromarray(rng.random((20, 20), dtype=np.float32)).save(stream, "TIFF")
    return stream.getvalue()


BROKEN: dict[str, tuple[str, Callable[[np.random.Generator], bytes], str]] = {
    "a truncated JPEG": ("cut.jpg", lambda rng: encoded(rng, "JPEG", 60, 60)[:-300], "truncated"),
    "a truncated PNG": ("cut.png", lambda rng: encoded(rng, "PNG", 60, 60)[:-300], "truncated|broken"),
    "a text with a picture's ending": ("text.png", lambda rng: b"not a picture\n" * 9, "not in a known format"),
    "a file of zero bytes": ("zero.gif", lambda rng: b"", "0 bytes|file is empty"),
    "a decompression bomb": ("bomb.png", lambda rng: bomb(), "at most 178,956,970 pixels.*400000000 pixels"),
    "a picture smaller than a patch": ("small.png", lambda rng: encoded(rng, height=3), "a patch or more .*; got 3 x"),
    "a narrow one": ("narrow.webp", lambda rng: encoded(rng, "WEBP", width=2), "a patch or more .*; got 12 x 2"),
    "values of 32 bits": ("deep.tif", deep, "8 or 16 bits; got 32"),
}
"""By what is wrong: a name, the file, and what must be said of it."""


@pytest.fixture
def bench(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: pictures of two classes, a config, a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "pets", classes(rng, 20))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    small_model(tmp_path / "model")
    return tmp_path


def command(verb: str, *sources: object) -> list[object]:
    """The verb with its sources; what it would leave is `out`."""
    if verb == "fit":
        return [
            "fit",
            "--config",
            "tiny.yaml",
            "--run_dir",
            "out",
            "--data.sources",
            f"[{', '.join(map(str, sources))}]",
        ]
    return [verb, "model", *sources, "--output", "out" if verb == "embed" else "out.csv"]


def refuse(arguments: list[object], said: str) -> None:
    """The command ends with code 2, one line that begins as `said`, and leaves nothing."""
    before = sorted(path for path in Path().rglob("*") if path.parts[0] != "cache")
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert re.fullmatch(rf"meristem: error: {said}[^\n]*\n", err), err
    assert sorted(path for path in Path().rglob("*") if path.parts[0] != "cache") == before


@pytest.mark.parametrize("verb", ["fit", "embed", "predict"])
@pytest.mark.parametrize("wrong", BROKEN)
def test_a_broken_picture_is_named_wherever_it_lies(
    wrong: str, verb: str, bench: Path, rng: np.random.Generator
) -> None:
    name, make, said = BROKEN[wrong]
    contents = {f"pets/{path.parent.name}/{path.name}": path.read_bytes() for path in Path("pets").glob("*/*")}
    payload = make(rng)
    write_folder(bench, {f"pets/dog/{name}": payload})
    refuse(command(verb, "pets"), rf"pets/dog/{re.escape(name)}: [^\n]*({said})")
    contents[f"pets/dog/{name}"] = payload
    write_tar(bench / "pets.tar", {key.removeprefix("pets/"): value for key, value in contents.items()})
    refuse(command(verb, "pets.tar"), rf"pets\.tar/dog/{re.escape(name)}: [^\n]*({said})")
    rows = [f"{key},{key.split('/')[1]}" for key in contents]
    Path("pets.csv").write_text("\n".join(["path,label", *rows, ""]))
    refuse(command(verb, "pets.csv"), rf"pets\.csv:{len(rows) + 1}: [^\n]*({said})")
    if verb != "fit":
        refuse(command(verb, "pets/cat/000.png", f"pets/dog/{name}"), rf"pets/dog/{re.escape(name)}: [^\n]*({said})")


def test_a_bomb_is_never_unpacked(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit is kept: its own check speaks before a pixel is decoded."""
    write_folder(bench, {"pets/dog/bomb.png": bomb()})
    loaded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (loaded.append(self.size), load(self))[1])
    refuse(command("embed", "pets"), r"pets/dog/bomb\.png: ")
    assert (20_000, 20_000) not in loaded
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.parametrize("verb", ["embed", "predict"])
def test_channels_that_a_picture_cannot_be_brought_to_are_named(
    verb: str, bench: Path, rng: np.random.Generator
) -> None:
    shutil.rmtree("model")
    small_model(bench / "model", num_channels=5)
    refuse(command(verb, "pets"), r"pets/cat/000\.png: .*5 channels must have so many pages.*; got 1 page")
    pages = [Image.fromarray(rng.integers(0, 256, (12, 16), np.uint8)) for _ in range(7)]
    pages[0].save("seven.tif", save_all=True, append_images=pages[1:])
    refuse(command(verb, "seven.tif"), r"seven\.tif: .*5 channels must have so many pages.*; got 7 page")
    pages[0].save("five.tif", save_all=True, append_images=pages[1:5])
    code, _, err = run(*command(verb, "five.tif"))
    assert code == 0, err


def test_channels_of_data_and_model_must_be_the_same(bench: Path) -> None:
    grey = ["--data.tokenizer", "{image_px: [8, 12], patch_px: 4, num_channels: 1}"]
    refuse(
        [*command("fit", "pets"), *grey, "--model.init_from", "model"],
        "tokenizer option num_channels must be 3, as of the model; got 1",
    )
    refuse(
        [*command("fit", "pets"), *grey, "--model.architecture.embedding.patch_features", "48"],
        r"[^\n]*patch_features must be 16, .*; got 48",
    )
    refuse(
        [*command("fit", "pets"), "--data.tokenizer", "{image_px: [8, 12], patch_px: 4, num_channels: 5}"],
        r"pets/\w+/\d+\.png: .*5 channels",
    )


def test_folders_that_cannot_be_learned_from_are_named(bench: Path, rng: np.random.Generator) -> None:
    write_folder(bench, {"pets/owl/readme.txt": b"none yet"})
    refuse(command("fit", "pets"), r"pets/owl/: a class folder must hold a picture; got none")
    shutil.rmtree("pets/owl")
    Path("pets/owl").mkdir()
    refuse(command("fit", "pets"), r"pets/owl/: a class folder must hold a picture; got none")
    Path("pets/owl").rmdir()
    write_folder(bench, {f"one/cat/{i}.png": encoded(rng) for i in range(40)})
    refuse(command("fit", "one"), r"[^\n]*label[^\n]* must have two classes or more[^\n]*cat")
    write_folder(bench, {f"flat/{i}.png": encoded(rng) for i in range(8)})
    refuse(command("fit", "flat"), r"flat: pictures must lie in folders that name their classes")
    write_folder(bench, {"texts/cat/a.txt": b"x"})
    for verb in ("fit", "embed", "predict"):
        refuse(command(verb, "texts"), r"texts: no picture in the folder")
        refuse(command(verb, "nowhere"), r"nowhere: no such file")


def test_pictures_without_classes_are_embedded_all_the_same(bench: Path, rng: np.random.Generator) -> None:
    """What a label would make wrong is nothing to a verb that asks for none."""
    write_folder(bench, {"flat/a.png": encoded(rng), "flat/owl/readme.txt": b"none yet"})
    for verb in ("embed", "predict"):
        code, _, err = run(*command(verb, "flat"))
        assert code == 0, err


SAVED = {
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
}
"""Modes that a format can hold."""


@pytest.mark.parametrize("kind", SAVED)
def test_what_the_reader_lets_through_is_read_in_any_number_of_channels(kind: str, rng: np.random.Generator) -> None:
    """Else a run would stop in the middle of an epoch."""
    for mode in SAVED[kind]:
        pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.frombytes("LAB", (16, 12), pixels.tobytes()) if mode == "LAB" else Image.fromarray(pixels)
        stream = io.BytesIO()
        (image if mode == "LAB" else image.convert(mode)).save(stream, kind)
        check_picture(stream.getvalue())
        for count in (1, 2, 3, 4):
            assert read_pixels(stream.getvalue(), count).shape == (12, 16, count), mode


# --- left out, counted and listed ------------------------------------------------------------------------------


def break_some(folder: Path, rng: np.random.Generator, share: float = 0.05) -> list[str]:
    """Files of a folder cut off, overwritten with text and emptied, by turns; their names within it."""
    files = sorted(folder.glob("*/*"))
    picked = [files[i] for i in rng.choice(len(files), round(share * len(files)), replace=False)]
    for number, path in enumerate(picked):
        whole = path.read_bytes()
        path.write_bytes([whole[: len(whole) * 2 // 3], b"a text with a picture's ending\n", b""][number % 3])
    return sorted(f"{path.parent.name}/{path.name}" for path in picked)


@pytest.fixture
def large(bench: Path, rng: np.random.Generator) -> SimpleNamespace:
    """200 pictures, JPEG and PNG, of which 10 are broken."""
    shutil.rmtree("pets")
    kinds = {"jpg": "JPEG", "png": "PNG"}
    for number, (shade, name) in enumerate([(i % 2, "cat" if i % 2 == 0 else "dog") for i in range(200)]):
        ending = ("jpg", "png")[number // 2 % 2]
        picture = encoded(rng, kinds[ending], 48, 40, shade)
        write_folder(bench, {f"pets/{name}/{number:03d}.{ending}": picture})
    return SimpleNamespace(broken=break_some(bench / "pets", rng))


MANY = [
    "--trainer.max_steps",
    "30",
    "--watch.validate_every_n_steps",
    "15",
    "--data.workers",
    "2",
    "--data.on_error",
    "skip",
]
"""Two epochs or more of packs of ten pictures, read by workers."""


def test_a_folder_with_five_percent_broken_files_trains_to_the_end(large: SimpleNamespace) -> None:
    assert len(large.broken) == 10
    refuse(command("fit", "pets"), rf"pets/{re.escape(large.broken[0])}: an image must be one that Pillow can read")
    code, _, err = run(*command("fit", "pets"), *MANY)
    assert code == 0, err
    assert "done: all 30 steps taken" in err
    assert "10 record(s) refused and left out, listed in refused.csv" in err
    with open("out/refused.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["id"] for row in rows) == large.broken
    assert {row["where"] for row in rows} == {f"pets/{name}" for name in large.broken}
    for said, count in (("not in a known format", 3), ("it is empty, 0 bytes", 3), ("truncated|broken", 4)):
        assert sum(bool(re.search(said, row["reason"])) for row in rows) == count, said
    # and the model that it leaves has seen the others: so many are there to predict
    code, out, err = run("predict", "out/model", "pets", "--output", "labels.csv", "--on-error", "skip")
    assert code == 0, err
    assert "refused records: 10" in out
    with open("labels.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 190


def test_a_reader_that_looks_at_headers_alone_is_caught(
    large: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a truncated picture has a header, and would stop the run in the middle of an epoch."""
    monkeypatch.setattr(reading, "check_picture", picture_px)
    code, _, err = run(*command("fit", "pets"), *MANY)
    refused = Path("out/refused.csv")
    assert code != 0 or len(refused.read_text().splitlines()) < 11, err
