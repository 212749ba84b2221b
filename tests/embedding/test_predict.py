"""Labels of a fine-tuned model: those of the heads on one sequence at a time, in input order."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_models import READOUTS, records_with_repeats, write_fasta

from meristem.cli.main import main
from meristem.data.pack import pack_column
from meristem.model_directory import load_model

MakeModel = Callable[..., Path]

ROUNDED = 2e-5
"""Text has six digits."""


def slow_predictions(folder: Path, sequence: str) -> dict[str, np.ndarray]:
    """The oracle: the heads on one sequence, probabilities of classes, values in their own unit."""
    card, model = load_model(folder)
    column = card.tokenizer.encode_column(pa.array([sequence], pa.large_string()))
    batch = pack_column(column, np.array([0]), [0])
    found = {}
    with torch.inference_mode():
        final = model.trunk(batch).final
        for readout in card.readouts:
            out = model.heads[readout.name](final, batch.layout, card.tokenizer.num_special)
            out = out[1 : 1 + len(sequence)] if readout.level == "token" else out
            if readout.task == "classification":
                out = out.softmax(-1)
            else:
                out = out * torch.tensor(readout.std) + torch.tensor(readout.mean)
            found[readout.name] = out.numpy()
    return found


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_each_record_has_the_labels_of_the_heads_in_input_order(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, suffix: str
) -> None:
    model, records = make_model_directory(readouts=READOUTS), records_with_repeats(rng, 40)
    source, output = write_fasta(tmp_path / "in.fa", records), tmp_path / f"labels.{suffix}"
    assert main(["predict", str(model), str(source), "--output", str(output)]) == 0
    rows = read_rows(output)
    assert [row["id"] for row in rows] == [name for name, _ in records]
    for row, (_, sequence) in zip(rows, records):
        wanted = slow_predictions(model, sequence)
        classes = READOUTS[2].classes
        assert row["place"] == classes[int(wanted["place"].argmax())]
        got = [float(row[f"place:{name}"]) for name in classes]
        np.testing.assert_allclose(got, wanted["place"][0], atol=ROUNDED)
        np.testing.assert_allclose(float(row["fitness"]), wanted["fitness"][0, 0], rtol=1e-5, atol=ROUNDED)
        assert row["ss"] == "".join("HEC"[i] for i in wanted["ss"].argmax(-1))


def test_one_row_a_token_has_its_probabilities(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, records = make_model_directory(readouts=READOUTS), records_with_repeats(rng, 6)
    source, output = write_fasta(tmp_path / "in.fa", records), tmp_path / "labels.csv"
    words = ["predict", str(model), str(source), "--output", str(output), "--per-token", "--label", "ss"]
    assert main(words) == 0
    rows = read_rows(output)
    assert [row["id"] for row in rows] == [name for name, sequence in records for _ in sequence]
    got = np.array([[float(row[f"ss:{name}"]) for name in "HEC"] for row in rows])
    wanted = np.concatenate([slow_predictions(model, sequence)["ss"] for _, sequence in records])
    np.testing.assert_allclose(got, wanted, atol=ROUNDED)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--label", "colour"], "colour"),
        (["--output", "labels.xlsx"], "labels.xlsx"),
        (["--precision", "fp8"], "fp8"),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    make_model_directory: MakeModel,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model_directory(readouts=READOUTS)
    source = write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5))
    before = sorted(tmp_path.iterdir())
    words = words if "--output" in words else [*words, "--output", "labels.csv"]
    try:
        code = main(["predict", str(model), str(source), *words])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_labels_says_so(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5))
    assert main(["predict", str(make_model_directory()), str(source), "--output", str(tmp_path / "o.csv")]) == 2
    assert "label" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()
