"""Pictures through the command line and the package: train, predict, embed; what is wrong is one line, exit code 2."""

import contextlib
import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import classes, encoded, read_all, write_folder, write_tar
from PIL import Image
from small_runs import CONFIG, run

import meristem
from meristem.cli.run_config import parse
from meristem.errors import ConfigError, DataError
from meristem.model.config import TransformerConfig
from meristem.model.plain import from_json
from meristem.model_directory import load_any
from meristem.train.run import build
from meristem.train.spec import values_of
from meristem_domains.vision import domain


@pytest.fixture
def bench(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures and a config, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "pets", classes(rng, 20))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with a run in it; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    write_folder(folder / "pets", classes(np.random.default_rng(), 20))
    (folder / "tiny.yaml").write_text(CONFIG)
    with contextlib.chdir(folder):
        code, _, err = run("fit", "--config", "tiny.yaml", "--data.cache_dir", "cache")
    assert code == 0, err
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it is the current folder."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))


def test_the_domain_keeps_the_contract(check_domain):
    assert [stage.name for stage in check_domain("vision")][-1] == "scorers"


def test_the_sample_is_the_digits_of_scikit_learn():
    from sklearn.datasets import load_digits

    assert domain.sample.stat().st_size < 400_000
    digits = load_digits()
    records = read_all(domain.sample, label_columns=("label", "split"))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(record.payload))) for record in records])
    np.testing.assert_array_equal(np.round(pixels / (255 / 16)), digits.images)
    assert [record.labels["label"] for record in records] == list(map(str, digits.target))
    parts = [record.labels["split"] for record in records]
    assert {part: parts.count(part) for part in set(parts)} == {"train": 1259, "validation": 179, "test": 359}


@pytest.mark.parametrize("name", ["sample"])
def test_shipped_configs_are_whole(name: str, bench: Path):
    config = parse(["--config", f"vision/{name}"])
    assert config is not None
    architecture = from_json(TransformerConfig, values_of(config)["model"]["architecture"])
    assert architecture.embedding.patch_features == 4
    build(config)


def test_presets_take_on_the_grid_and_the_channels_of_the_data(bench: Path):
    more = ["--data.tokenizer", "{image_px: [32, 64], patch_px: 8, num_channels: 1}", "--model.architecture"]
    config = parse(["--config", "tiny.yaml", *more, "{preset: vit_tiny, pool: {kind: Mean}}"])
    assert config is not None
    architecture = values_of(config)["model"]["architecture"]
    assert architecture["embedding"]["patch_features"] == 64
    assert architecture["position"]["grid"] == [4, 8]
    assert architecture["position"]["max_positions"] == 32
    assert architecture["embedding"]["vocab_size"] == 1
    for name, preset in domain.presets.items():
        assert preset.embedding.patch_features in (768, 4, 16, 48), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.architecture.embedding.patch_features", "5"], "patch_features must be 48, .*; got 5"),
        (
            ["--model.architecture.position", "{kind: Learned, grid: [3, 3], max_positions: 9}"],
            r"\[2, 3\]; got \[3, 3\]",
        ),
        (["--model.architecture.position", "{kind: Rotary}"], "num_axes must be 2, as of the data; got 1"),
        (["--model.architecture.position", "{kind: Sinusoidal}"], "must be of 2 axes, as the data is; got Sinusoidal"),
        (["--data.tokenizer", "{image_px: [8, 13], patch_px: 4}"], "patch_px must divide"),
        (["--data.tokenizer", "{image_px: 8, patch: 4}"], "does not take that: .*'patch'"),
        (["--data.tokenizer", "{image_px: [8, 12], patch_px: 4, num_channels: 5}"], r"pets/\w+/\d+\.png: .*5 channels"),
        (["--data.tokenizer", "{image_px: 32, patch_px: 16}"], "a patch or more high and wide, 16 px; got 12 x 16"),
        (["--data.sources", "pets/cat"], "pets/cat: pictures must lie in folders that name their classes"),
    ],
)
def test_data_and_model_that_do_not_fit_are_named(arguments: list[str], said: str, bench: Path):
    code, _, err = run("fit", "--config", "tiny.yaml", *arguments)
    assert code == 2
    assert re.fullmatch(rf"meristem: error: [^\n]*{said}[^\n]*\n", err), err
    assert not (bench / "runs").exists()


def test_a_broken_picture_stops_before_anything_is_written(rng: np.random.Generator, bench: Path):
    cases = {
        "cut.jpg": (encoded(rng, "JPEG", 60, 60)[:-300], "truncated"),
        "text.png": (b"a text", "not in a known format"),
        "zero.gif": (b"", "0 bytes"),
        "small.png": (encoded(rng, height=3), "a patch or more"),
    }
    for name, (payload, said) in cases.items():
        path = bench / "pets" / "dog" / name
        path.write_bytes(payload)
        code, _, err = run("fit", "--config", "tiny.yaml")
        assert code == 2
        assert re.fullmatch(rf"meristem: error: pets/dog/{name}: [^\n]*{said}[^\n]*\n", err), err
        assert not (bench / "runs").exists()
        path.unlink()
    write_folder(bench / "one", {"cat/a.png": encoded(rng), "cat/b.png": encoded(rng), "cat/c.png": encoded(rng)})
    code, _, err = run("fit", "--config", "tiny.yaml", "--data.sources", "one", "--data.split.validation_frac", "0")
    assert code == 2
    assert "must have two classes or more" in err
    assert err.count("\n") == 1


def test_a_folder_with_broken_pictures_trains_to_the_end_and_lists_them(rng: np.random.Generator, bench: Path):
    broken = {
        "cat/cut.jpg": encoded(rng, "JPEG", 60, 60)[:-300],
        "dog/text.png": b"a text",
        "dog/zero.gif": b"",
        "dog/small.png": encoded(rng, height=3),
    }
    write_folder(bench / "pets", broken)
    code, _, err = run("fit", "--config", "tiny.yaml", "--data.on_error", "skip", "--run_dir", "run")
    assert code == 0, err
    assert "4 record(s) refused and left out, listed in refused.csv" in err
    assert "40 records" not in err  # they are dealt to two parts
    with (bench / "run" / "refused.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] for row in rows} == set(broken)
    assert {row["where"] for row in rows} == {f"pets/{name}" for name in broken}
    assert (bench / "run" / "model" / "config.json").exists()
    code, _, err = run("fit", "--config", "tiny.yaml", "--run_dir", "other")
    assert code == 2, "without the option they are errors"


def test_native_resolution_trains_and_a_vector_does_not_depend_on_its_mates(rng: np.random.Generator, bench: Path):
    for i in range(12):
        picture = encoded(rng, height=int(rng.integers(8, 60)), width=int(rng.integers(8, 60)))
        write_folder(bench / "pets", {f"cat/n{i}.png": picture})
    native = ["--data.tokenizer", "{image_px: null, patch_px: 4, max_patches: 40}"]
    code, _, err = run("fit", "--config", "tiny.yaml", *native)
    assert code == 0, err
    card, _ = load_any("runs/tiny")
    assert card.architecture.position.__class__.__name__ == "SinCos2D"
    for name, budget in (("packed", []), ("alone", ["--tokens-per-batch", "1"])):
        assert run("embed", "runs/tiny", "pets", "--output", name, "--precision", "fp32", *budget)[0] == 0
    packed, alone = (meristem.read_embeddings(name) for name in ("packed", "alone"))
    assert len(set(packed.ids)) == 52
    # on a CPU they are the same bits; elsewhere within rounding
    np.testing.assert_allclose(packed.values, alone.values, rtol=0, atol=1e-5 * np.sqrt((alone.values**2).mean()))


def test_embed_and_predict_give_the_same_for_every_kind_of_source(trained: None):
    contents = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(Path("pets").glob("*/*.png"))}
    write_tar(Path("pets.tar"), contents)
    Path("pets.csv").write_text("path\n" + "\n".join(f"pets/{name}" for name in contents))
    found = []
    for number, source in enumerate(("pets", "pets.tar", "pets.csv")):
        assert run("embed", "runs/tiny", source, "--output", f"out{number}", "--precision", "fp32")[0] == 0
        found.append(meristem.read_embeddings(f"out{number}"))
        assert run("predict", "runs/tiny", source, "--output", f"labels{number}.csv", "--precision", "fp32")[0] == 0
    assert list(found[0].ids) == list(found[1].ids) == list(contents)
    for one in found[1:]:
        np.testing.assert_array_equal(one.values, found[0].values)
    with open("labels0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(contents)
    assert {row["label"] for row in rows} <= {"cat", "dog"}
    single = [f"pets/{name}" for name in list(contents)[:3]]
    assert run("embed", "runs/tiny", *single, "--output", "some", "--precision", "fp32")[0] == 0
    some = meristem.read_embeddings("some")
    assert list(some.ids) == single
    np.testing.assert_array_equal(some.values, found[0].values[:3])


def test_one_vector_a_patch_has_the_places_of_the_patches(trained: None):
    assert run("embed", "runs/tiny", "pets", "--output", "out", "--pool", "none")[0] == 0
    assert meristem.read_embeddings("out")[0].shape == (6, 16)


@pytest.mark.parametrize("verb", ["embed", "predict"])
def test_a_broken_picture_is_refused_by_name_or_left_out_and_counted(
    verb: str, trained: None, rng: np.random.Generator
):
    broken = {
        "cat/cut.jpg": encoded(rng, "JPEG", 60, 60)[:-300],
        "dog/zero.png": b"",
        "dog/s.png": encoded(rng, width=2),
    }
    write_folder(Path("pets"), broken)
    output = "out" if verb == "embed" else "out.csv"
    code, _, err = run(verb, "runs/tiny", "pets", "--output", output)
    assert code == 2
    assert re.search(r"^meristem: error: pets/cat/cut\.jpg: [^\n]*truncated", err, re.M), err
    assert not Path(output).exists()
    code, out, err = run(verb, "runs/tiny", "pets", "--output", output, "--on-error", "skip")
    assert code == 0, err
    assert "refused records: 3" in out
    for name in broken:
        assert f"refused pets/{name}: an image must" in err


def test_the_package_embeds_paths_and_arrays(trained: None, rng: np.random.Generator):
    model = meristem.load("runs/tiny", device="cpu")
    paths = sorted(Path("pets").glob("*/*.png"))[:5]
    expected = model.embed(paths, precision="fp32")
    arrays = [np.asarray(Image.open(path)) for path in paths]
    for values in (list(map(str, paths)), [path.read_bytes() for path in paths], arrays, np.stack(arrays)):
        np.testing.assert_array_equal(model.embed(values, precision="fp32"), expected)
    assert model.predict([paths[0], arrays[1]])["label"].values.shape == (2, 2)
    with pytest.raises(DataError, match=r"sequence 1: nowhere\.jpg: cannot be read: No such file"):
        model.embed([paths[0], "nowhere.jpg"])
    for wrong in (str(paths[0]), paths[0], b"x"):
        with pytest.raises(ConfigError, match="must be a list"):
            model.embed(wrong)
    _, width, channels = arrays[0].shape
    with pytest.raises(DataError, match=rf"sequence 0: an image must be .*; got \[{width}, {channels}\]"):
        model.embed(arrays[0])


def test_a_model_goes_on_at_another_size(trained: None, rng: np.random.Generator):
    model = meristem.load("runs/tiny", device="cpu", tokenizer={"image_px": (16, 16)})
    assert model.embed([rng.integers(0, 256, (20, 20, 3), np.uint8)]).shape == (1, 16)
    larger = [
        "--data.tokenizer",
        "{image_px: [12, 16], patch_px: 4}",
        "--model.init_from",
        "runs/tiny/model",
        "--run_dir",
        "larger",
    ]
    code, _, err = run("fit", "--config", "tiny.yaml", *larger)
    assert code == 0, err
    card, _ = load_any("larger")
    assert card.architecture.position.grid == (3, 4)
    assert card.tokenizer.image_px == (12, 16)
    wrong = ["--data.tokenizer", "{image_px: 16, patch_px: 8}", "--model.init_from", "runs/tiny/model"]
    code, _, err = run("fit", "--config", "tiny.yaml", *wrong, "--run_dir", "wrong")
    assert code == 2
    assert "tokenizer option patch_px must be 4, as of the model; got 8" in err
