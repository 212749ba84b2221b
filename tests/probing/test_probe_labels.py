"""Labels and groups of a probe: what is a class, what is missing, and what stays together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from small_probes import protein_of, read_rows, write_table

Probe = Callable[..., dict]


def test_declared_words_are_missing_and_others_are_classes_or_errors(
    tmp_path: Path, model: Path, table: Path, probe: Probe
) -> None:
    rows = read_rows(table)
    for i, row in enumerate(rows):
        row["kind"] = "NA" if i % 5 == 0 else row["kind"]
    write_table(table, rows)
    assert probe(model, table)["classes"] == ["NA", "k0", "k1", "k2"]
    found = probe(model, table, "--missing-label", "NA", "--missing-label", "?")
    assert found["classes"] == ["k0", "k1", "k2"]
    assert found["records"]["without_label"] == 60
    numbers = write_table(
        tmp_path / "numbers.csv", [row | {"kind": i / 7 if i % 5 else "NA"} for i, row in enumerate(rows)]
    )
    assert "other words: NA 60; say --missing-label WORD" in probe(model, numbers, code=2)["said"]
    assert "numbers.csv:" in probe(model, numbers, "--task", "regression", code=2)["said"]
    assert probe(model, numbers, "--missing-label", "NA")["task"] == "regression"


def test_classes_are_told_apart_by_their_text(tmp_path: Path, model: Path, table: Path, probe: Probe) -> None:
    names = {"k0": "01", "k1": "1", "k2": "12345678901234567890"}
    write_table(table, [row | {"kind": names[row["kind"]]} for row in read_rows(table)])
    assert probe(model, table)["classes"] == ["01", "1", "12345678901234567890"]


def test_groups_stay_on_one_side_of_every_split(
    tmp_path: Path, model: Path, table: Path, probe: Probe, rng: np.random.Generator
) -> None:
    rows = [row | {"patient": f"g{rng.integers(0, 40)}", "part": ""} for row in read_rows(table)]
    write_table(table, rows)
    group = {row["id"]: row["patient"] for row in rows}
    for split in ("hash", "similarity"):
        probe(model, table, "--split", split, "--group-column", "patient", output=split)
        tested = {row["id"] for row in read_rows(tmp_path / split / "predictions.csv")}
        assert not {group[id] for id in tested} & {group[id] for id in set(group) - tested}
    for row in rows:
        row["part"] = "test" if row["patient"] < "g2" else "train"
    write_table(table, rows)
    probe(model, table, "--split-column", "part", "--group-column", "patient")
    next(row for row in rows if row["part"] == "train")["part"] = "test"
    write_table(table, rows)
    said = probe(model, table, "--split-column", "part", "--group-column", "patient", code=2)["said"]
    assert "must lie in one part; this record is in" in said
    test = write_table(
        tmp_path / "test.csv", [{"id": "t", "sequence": protein_of(rng, 0), "kind": "k0", "patient": "g7"}]
    )
    said = probe(model, table, "--test", test, "--group-column", "patient", code=2)["said"]
    assert "test.csv:2: the group 'g7' must lie in one part; this record is in test, and" in said
