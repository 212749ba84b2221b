"""`meristem probe` on pictures: a folder, a table and a tar file say the same; what cannot be probed is named."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import classes, encoded, write_folder, write_tar
from small_runs import run, small_model

from meristem_domains.vision import reading


@pytest.fixture
def pets(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What is in the folder `pets`, which lies beside a model in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    small_model(tmp_path / "model")
    contents = classes(rng, 40)
    write_folder(tmp_path / "pets", contents)
    return contents


def probe(source: str, *arguments: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures, and by picture what the linear map says of it."""
    output = f"probe_of_{source}"
    code, _, err = run("probe", "model", source, "--label", "label", "--output", output, *arguments)
    assert code == 0, err
    with open(f"{output}/predictions.csv", newline="") as file:
        rows = {row["id"].removeprefix("pets/"): row["linear"] for row in csv.DictReader(file)}
    return json.loads(Path(f"{output}/metrics.json").read_text()), rows


def test_every_kind_of_source_is_probed_alike(pets: dict[str, bytes]) -> None:
    write_tar(Path("pets.tar"), pets)
    Path("pets.csv").write_text("\n".join(["path,label", *(f"pets/{name},{name[:3]}" for name in pets), ""]))
    figures, rows = probe("pets")
    assert figures["classes"] == ["cat", "dog"]
    assert figures["linear"]["accuracy"] > 0.8  # a shade survives any map; chance is 0.5
    assert {name[:3] for name in rows} == {"cat", "dog"}
    for source in ("pets.tar", "pets.csv"):
        other, same = probe(source)
        assert same == rows
        for part in ("linear", "knn", "records", "most_frequent_class"):
            assert other[part] == figures[part], part


def test_a_reader_that_mixes_up_its_labels_is_caught(
    pets: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """The mutant: folders are read in the order of the disk, and labels in that of the names."""
    names = list(pets)
    shuffled = dict(zip(names, rng.permutation(names).tolist()))
    load = reading._load
    monkeypatch.setattr(reading, "_load", lambda path: load(Path("pets", shuffled[f"{path.parent.name}/{path.name}"])))
    figures, _ = probe("pets", "--test-frac", "0.4")
    # 32 throws of a coin: half, and four deviations
    assert figures["linear"]["accuracy"] < 0.85


def test_broken_pictures_are_refused_or_counted(pets: dict[str, bytes], rng: np.random.Generator) -> None:
    broken = {
        "cat/cut.jpg": encoded(rng, "JPEG", 60, 60)[:-300],
        "dog/zero.png": b"",
        "dog/s.png": encoded(rng, width=2),
    }
    write_folder(Path("pets"), broken)
    command = ["probe", "model", "pets", "--label", "label", "--output", "out"]
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"meristem: error: pets/cat/cut\.jpg: [^\n]*truncated[^\n]*\n", err)
    assert not Path("out").exists()
    figures, _ = probe("pets", "--on-error", "skip")
    assert figures["records"]["refused"] == 3
    assert sum(figures["records"][part] for part in ("train", "validation", "test")) == len(pets)


@pytest.mark.parametrize(
    ("source", "label", "said"),
    [
        ("flat", "label", "flat: pictures must lie in folders that name their classes"),
        ("pets", "breed", "pets: no column 'breed': a folder has one label, 'label'"),
        ("one", "label", r"label 'label' must have two classes or more[^\n]*cat"),
        ("nowhere", "label", "nowhere: no such file"),
    ],
)
def test_what_cannot_be_probed_is_one_line(
    source: str, label: str, said: str, pets: dict[str, bytes], rng: np.random.Generator
) -> None:
    write_folder(Path(), {f"flat/{i}.png": encoded(rng) for i in range(9)})
    write_folder(Path(), {f"one/cat/{i}.png": encoded(rng) for i in range(40)})
    code, out, err = run("probe", "model", source, "--label", label, "--output", "out")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"meristem: error: [^\n]*{said}[^\n]*\n", err), err
    assert not Path("out").exists()
