"""`meristem probe` from files to figures, for proteins and for pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_probes
from image_table import write_images
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small_probes import protein_of, read_rows, write_table

import meristem
from meristem.probing import run
from meristem.probing import vectors as vectors_module
from meristem.probing.measures import value_figures
from meristem_domains.protein import domain as protein_domain

Probe = Callable[..., dict]


def test_figures_and_predictions_are_those_of_scikit_learn_on_the_same_vectors(
    tmp_path: Path, model: Path, table: Path, probe: Probe
) -> None:
    found = probe(model, table, "--k", "9", "--pool", "mean", "--precision", "fp32")
    assert (tmp_path / "probe" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    rows, predicted = read_rows(table), read_rows(tmp_path / "probe" / "predictions.csv")
    label = {row["id"]: row["kind"] for row in rows}
    assert [row["label"] for row in predicted] == [label[row["id"]] for row in predicted]
    is_test = np.isin([row["id"] for row in rows], [row["id"] for row in predicted])
    assert found["records"]["test"] == is_test.sum()
    assert found["records"]["train"] + found["records"]["validation"] == (~is_test).sum()
    vectors = meristem.load(model, device="cpu").embed([row["sequence"] for row in rows], pool="mean", precision="fp32")
    kinds = np.array([row["kind"] for row in rows])
    neighbours = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    theirs = neighbours.fit(vectors[~is_test], kinds[~is_test]).predict(vectors[is_test])
    assert [row["knn"] for row in predicted] == theirs.tolist()
    scaler = StandardScaler().fit(vectors[~is_test].astype(np.float64))
    linear = LogisticRegression(C=1 / (found["linear"]["l2"] * (~is_test).sum()), max_iter=5000, tol=1e-8)
    linear.fit(scaler.transform(vectors[~is_test].astype(np.float64)), kinds[~is_test])
    score = linear.score(scaler.transform(vectors[is_test].astype(np.float64)), kinds[is_test])
    assert abs(found["linear"]["accuracy"] - score) <= 0.01 + 1 / is_test.sum()
    true = kinds[is_test]
    for method in ("linear", "knn"):
        given = [row[method] for row in predicted]
        assert found[method]["accuracy"] == pytest.approx(metrics.accuracy_score(true, given))
        assert found[method]["macro_f1"] == pytest.approx(metrics.f1_score(true, given, average="macro"))
        assert found[method]["mcc"] == pytest.approx(metrics.matthews_corrcoef(true, given))
        assert "top5_accuracy" not in found[method]
    assert found["linear"]["accuracy"] > 0.7  # what a kind's residues give away at random weights; chance is 0.33
    assert found["said"].count("accuracy") == 3


def test_the_families_of_the_sample_are_found(
    tmp_path: Path, model: Path, probe: Probe, rng: np.random.Generator
) -> None:
    """Real proteins, split so that whole families are not told by near-copies alone being there."""
    rows = []
    for record in protein_domain.sample.read_text().split(">")[1:]:
        header, *lines = record.splitlines()
        rows.append({"id": header.split()[0], "sequence": "".join(lines), "kind": header.split("family=")[1]})
    table = write_table(tmp_path / "sample.csv", rows)
    found = probe(model, table, "--test-frac", "0.3", "--method", "both")
    assert len(found["classes"]) > 5
    for method in ("linear", "knn"):
        assert found[method]["accuracy"] > found["most_frequent_class"]["accuracy"]
        assert found[method]["accuracy"] <= found[method]["top5_accuracy"] <= 1


def test_the_same_call_gives_the_same_bytes_and_embeds_once(
    tmp_path: Path, model: Path, table: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe(model, table, output="a")
    assert "300 records" in first["progress"]
    monkeypatch.setattr(vectors_module, "run_job", lambda *_: pytest.fail("embedded again"))
    again = probe(model, table, output="b")
    assert "300 vectors of an earlier call are used again" in again["progress"]
    for name in ("metrics.json", "predictions.csv", "confusion.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    other = probe(model, table, "--seed", "1", output="c")
    assert read_rows(tmp_path / "c" / "predictions.csv") != read_rows(tmp_path / "a" / "predictions.csv")
    assert other["vectors"] == first["vectors"]


def test_another_label_of_the_same_records_embeds_nothing(
    tmp_path: Path, model: Path, table: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row | {"length": len(row["sequence"]) / 7} for row in read_rows(table)]
    write_table(table, rows)
    probe(model, table)
    monkeypatch.setattr(vectors_module, "run_job", lambda *_: pytest.fail("embedded again"))
    probe(model, table, "--label", "length", output="other")


def test_another_model_is_embedded_anew(tmp_path: Path, model: Path, table: Path, probe: Probe) -> None:
    first = probe(model, table, output="a")
    other = probe(small_probes.save_protein_model(tmp_path / "other"), table, output="b")
    assert "300 records" in other["progress"]
    assert other["model"]["hash"] != first["model"]["hash"]


@pytest.mark.parametrize("named", ["", "vision"])
def test_the_domain_that_is_asked_for_reads_the_records(
    named: str, tmp_path: Path, model: Path, table: Path, probe: Probe
) -> None:
    wanted = probe(model, table)
    card = json.loads((model / "config.json").read_text())
    assert card["domain"] == "protein"
    (model / "config.json").write_text(json.dumps(card | {"domain": named}))
    said = probe(model, table, output="other", code=2)["said"]
    assert ("the model names no domain" if not named else "in.csv") in said
    found = probe(model, table, "--domain", "protein", output="asked")
    assert (found["linear"], found["knn"]) == (wanted["linear"], wanted["knn"])


def test_values_get_ridge_and_rank_correlation(
    tmp_path: Path, model: Path, table: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(run, "value_figures", lambda *given: measured.append(given) or value_figures(*given))
    rows = [row | {"share": sum(map(row["sequence"].count, "LAGV")) / len(row["sequence"])} for row in read_rows(table)]
    write_table(table, rows)
    found = probe(model, table, "--label", "share")
    assert found["task"] == "regression"
    assert found["linear"]["spearman"] > 0.5  # the mean of the rows knows what residues there are
    assert found["linear"]["r2"] > 0.2
    predicted = read_rows(tmp_path / "probe" / "predictions.csv")
    share = {row["id"]: row["share"] for row in rows}
    assert all(abs(float(row["label"]) - share[row["id"]]) < 1e-5 for row in predicted)
    from scipy.stats import spearmanr

    # ranks are those of the values before they are written with six digits, which may tie
    for method, (true, values) in zip(("linear", "knn"), measured, strict=True):
        assert found[method]["spearman"] == pytest.approx(spearmanr(true, values).statistic, abs=1e-12)
        assert [float(row[method]) for row in predicted] == pytest.approx(values.tolist(), rel=5e-6)
    assert (tmp_path / "probe" / "values.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "probe" / "confusion.png").exists()


def test_whole_numbers_are_classes_unless_values_are_asked_for(model: Path, table: Path, probe: Probe) -> None:
    write_table(table, [row | {"kind": len(row["sequence"]) // 10} for row in read_rows(table)])
    assert probe(model, table)["classes"] == ["2", "3", "4", "5"]
    assert probe(model, table, "--task", "regression")["linear"]["spearman"] is not None


def test_labels_that_are_missing_are_left_out_and_counted(
    tmp_path: Path, model: Path, table: Path, probe: Probe
) -> None:
    rows = read_rows(table)
    for row in rows[::5]:
        row["kind"] = ""
    write_table(table, rows)
    found = probe(model, table)
    records = found["records"]
    assert records["without_label"] == 60
    assert records["train"] + records["validation"] + records["test"] == 240
    assert "records without a label, left out: 60" in found["said"]
    left_out = {row["id"] for row in rows[::5]}
    assert not left_out & {row["id"] for row in read_rows(tmp_path / "probe" / "predictions.csv")}


def test_a_split_column_deals_and_classes_that_training_lacks_are_named(
    tmp_path: Path, model: Path, table: Path, probe: Probe, rng: np.random.Generator
) -> None:
    rows = [row | {"part": rng.choice(["train", "valid", "test"])} for row in read_rows(table)]
    for row in [row for row in rows if row["part"] == "test"][:4]:
        row["kind"] = "rare"
    write_table(table, rows)
    found = probe(model, table, "--split-column", "part")
    predicted = read_rows(tmp_path / "probe" / "predictions.csv")
    assert [row["id"] for row in predicted] == [row["id"] for row in rows if row["part"] == "test"]
    assert found["records"]["validation"] == sum(row["part"] == "valid" for row in rows)
    assert found["unknown_classes"] == {"rare": 4}
    assert "classes of the test that training lacks, counted as wrong: rare (4)" in found["said"]
    assert "rare" not in {row[method] for row in predicted for method in ("linear", "knn")}


def test_files_for_the_test_are_the_test_and_copies_are_counted(
    tmp_path: Path, model: Path, table: Path, probe: Probe, rng: np.random.Generator
) -> None:
    new = [{"id": f"t{i}", "sequence": protein_of(rng, i % 3), "kind": f"k{i % 3}"} for i in range(30)]
    copies = [row | {"id": f"c{i}"} for i, row in enumerate(read_rows(table)[:7])]
    test = write_table(tmp_path / "test.csv", new + copies)
    found = probe(model, table, "--test", test)
    assert [row["id"] for row in read_rows(tmp_path / "probe" / "predictions.csv")] == [r["id"] for r in new + copies]
    assert found["records"]["train"] + found["records"]["validation"] == 300
    assert found["records"]["test_seen_in_training"] == 7
    assert "whose payload is also in training: 7" in found["said"]


def test_similar_records_do_not_straddle(tmp_path: Path, model: Path, probe: Probe, rng: np.random.Generator) -> None:
    rows = []
    for family in range(60):
        parent = list(protein_of(rng, family % 2) + protein_of(rng, family % 2))
        for member in range(4):
            child = parent.copy()
            child[int(rng.integers(len(child)))] = "W"
            rows.append({"id": f"{family}.{member}", "sequence": "".join(child), "kind": "ab"[family % 2]})
    found = probe(model, write_table(tmp_path / "families.csv", rows), "--split", "similarity")
    tested = [row["id"].split(".")[0] for row in read_rows(tmp_path / "probe" / "predictions.csv")]
    assert len(tested) == 4 * len(set(tested)) == found["records"]["test"]


def test_a_probe_of_shuffled_labels_finds_chance(
    tmp_path: Path, model: Path, table: Path, probe: Probe, rng: np.random.Generator
) -> None:
    """The figures come from the labels of the records: mixed among them, they tell nothing."""
    rows = read_rows(table)
    assert probe(model, table)["linear"]["accuracy"] > 0.7
    for row, kind in zip(rows, rng.permutation([row["kind"] for row in rows])):
        row["kind"] = kind
    write_table(table, rows)
    found = probe(model, table, "--k", "1")
    for method in ("linear", "knn"):  # a record that is its own neighbour would be right every time
        assert found[method]["accuracy"] < 0.65  # a third, and five deviations of 60 throws


@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_labels_or_vectors_a_row_off_would_be_seen(
    kind: str,
    tmp_path: Path,
    model: Path,
    table: Path,
    probe: Probe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "labels":
        labels = run.read_labels
        monkeypatch.setattr(run, "read_labels", lambda *arguments: list(np.roll(labels(*arguments), 1)))
    else:
        stored = run.stored_vectors

        def off(*arguments: object) -> tuple:
            rows, values, manifest = stored(*arguments)
            return rows, np.roll(values, 1, 0), manifest

        monkeypatch.setattr(run, "stored_vectors", off)
    assert probe(model, table)["linear"]["accuracy"] < 0.65


def test_pictures_are_probed_by_the_same_code(tmp_path: Path, probe: Probe, rng: np.random.Generator) -> None:
    model, _ = small_probes.save_image_model(tmp_path / "images")
    kinds = rng.integers(0, 6, 240)
    pictures = [np.clip(rng.normal(40 * kind + 20, 30, (20, 24, 3)), 0, 255).astype(np.uint8) for kind in kinds]
    parts = rng.choice(["train", "test"], 240).tolist()
    table = write_images(tmp_path / "pictures.parquet", pictures, kind=kinds.tolist(), part=parts)
    found = probe(model, table, "--split-column", "part")
    assert found["classes"] == list("012345")
    for method in ("linear", "knn"):
        assert found[method]["accuracy"] > 0.8  # brightness survives any map
        assert found[method]["top5_accuracy"] >= found[method]["accuracy"]
    assert "vision has none (Domain.similarity)" in probe(model, table, "--split", "similarity", code=2)["said"]


def test_a_folder_of_class_folders_is_probed(tmp_path: Path, probe: Probe, rng: np.random.Generator) -> None:
    from PIL import Image

    model, _ = small_probes.save_image_model(tmp_path / "images")
    for part, count in (("train", 40), ("test", 15)):
        for kind, low in (("dark", 0), ("light", 150)):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(low, low + 100, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / part / kind / f"{i}.png")
    (tmp_path / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG")
    arguments = [tmp_path / "train", "--test", tmp_path / "test", "--label", "label"]
    assert "broken.png" in probe(model, *arguments, code=2)["said"]
    found = probe(model, *arguments, "--on-error", "skip")
    assert found["records"]["refused"] == 1
    assert found["classes"] == ["dark", "light"]
    assert found["linear"]["accuracy"] == found["knn"]["accuracy"] == 1.0
    predicted = read_rows(tmp_path / "probe" / "predictions.csv")
    assert [row["label"] for row in predicted] == ["dark"] * 15 + ["light"] * 15


def test_a_record_that_the_tokenizer_refuses_is_skipped_with_its_label(
    tmp_path: Path, probe: Probe, rng: np.random.Generator
) -> None:
    model, _ = small_probes.save_image_model(tmp_path / "images")
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = ["ab"[i % 2] for i in range(80)]
    pictures = [rng.integers(0, 100 + 100 * (kind == "b"), (16, 16, 3)).astype(np.uint8) for kind in kinds]
    path = write_images(tmp_path / "some.parquet", pictures, kind=kinds)
    whole = pq.read_table(path)
    broken = whole["image"].to_pylist()
    for row in (0, 33, 79):
        broken[row] = b"no picture"
    pq.write_table(whole.set_column(1, "image", pa.array(broken, pa.large_binary())), path)
    assert "some.parquet:1" in probe(model, path, code=2)["said"]
    found = probe(model, path, "--on-error", "skip")
    records = found["records"]
    assert records["refused"] == 3
    assert records["train"] + records["validation"] + records["test"] == 77
    assert found["linear"]["accuracy"] > 0.8  # rows still belong to their labels
    again = probe(model, path, "--on-error", "skip", output="again")
    assert again["linear"] == found["linear"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda row: row | {"kind": "only"}, [], "must have two classes or more among the training records; got only"),
        (lambda row: row | {"kind": ""}, [], "no record has a label 'kind'"),
        (
            lambda row: row | {"kind": "x"},
            ["--task", "regression"],
            "label 'kind' must be a finite number; got 'x' (if",
        ),
        (lambda row: row | {"kind": 1.5}, [], "must have two values or more"),
        (lambda row: row, ["--label", "nope"], "no column 'nope'; columns: "),
        (lambda row: row, ["--k", "0"], "k must be 1 or more; got 0"),
        (lambda row: row, ["--k", "9999"], "k must be at most the records for training, "),
        (lambda row: row, ["--temperature", "0"], "temperature must be above 0"),
        (lambda row: row, ["--test-frac", "0.95"], "leave some for training"),
        (lambda row: row, ["--seed", "-1"], "seed must be 0 or more"),
        (lambda row: row, ["--layer", "7"], "layer must be in 0..2"),
        (lambda row: row, ["--pool", "own"], "pool own needs a model that has a pooling of its own"),
        (lambda row: row | {"part": "train"}, ["--split-column", "part"], "names no record for the test"),
        (lambda row: row, ["--split-column", "kind"], "the split column must be one of"),
        (lambda row: row, ["--split-column", "part", "--test-frac", "0.5"], "have no effect with a split column"),
    ],
)
def test_what_cannot_be_probed_is_one_line_and_leaves_nothing(
    change: Callable[[dict], dict],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    model: Path,
    table: Path,
    probe: Probe,
) -> None:
    write_table(table, [change(row) for row in read_rows(table)[:60]])
    assert message in probe(model, table, *arguments, code=2)["said"]
    assert not (tmp_path / "probe").exists()


def test_an_output_that_holds_something_else_is_left_alone(
    tmp_path: Path, model: Path, table: Path, probe: Probe
) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "thesis.tex").write_text("x")
    assert "must be new, empty or of an earlier probe" in probe(model, table, code=2)["said"]


def test_a_damaged_cache_is_not_believed(tmp_path: Path, model: Path, table: Path, probe: Probe) -> None:
    first = probe(model, table, output="a")
    [folder] = (tmp_path / "cache" / "vectors").iterdir()
    other = write_table(tmp_path / "other.csv", [row | {"id": row["id"] + "x"} for row in read_rows(table)])
    probe(model, other, output="b")
    [new] = [path for path in (tmp_path / "cache" / "vectors").iterdir() if path != folder]
    shutil.rmtree(folder)
    new.rename(folder)
    assert "holds vectors of other records; remove it" in probe(model, table, output="c", code=2)["said"]
    shutil.rmtree(folder)
    assert probe(model, table, output="d")["linear"] == first["linear"]
