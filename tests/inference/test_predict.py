"""Labels of records and tokens: what the heads say, in input order, whatever is computed beside them."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_models import READOUTS, column_of, random_ids, random_protein, write_fasta

from meristem.data.pack import pack
from meristem.errors import ConfigError, DataError
from meristem.inference.engine import TrunkRunner
from meristem.inference.predict import Predict, Predictor
from meristem.inference.run import run_job
from meristem.model.config import Learned
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model_directory import ModelCard, load_model
from model_runs import outputs_of

MakeModel = Callable[..., Path]


def slow_outputs(card: ModelCard, loaded: Model, text: str) -> dict[str, np.ndarray]:
    """The oracle: the heads called on one sequence, probabilities and units by hand."""
    tokens = card.tokenizer.encode(text)
    batch = pack([tokens], [0])
    found = {}
    with torch.inference_mode():
        for readout in card.readouts:
            out = outputs_of(loaded, batch, readout.name).double()
            out = out[:1] if readout.level == "record" else out[1 : 1 + len(text)]
            if readout.task == "classification":
                out = out.exp() / out.exp().sum(-1, keepdim=True)
            else:
                out = out * torch.tensor(readout.std) + torch.tensor(readout.mean)
            found[readout.name] = out.numpy()
    return found


def random_records(rng: np.random.Generator, count: int = 40) -> list[tuple[str, str]]:
    return [(f"p{i % 30}", random_protein(rng)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_each_record_has_its_labels_in_input_order(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, suffix: str
) -> None:
    model, records = make_model_directory(readouts=READOUTS), random_records(rng)
    output = tmp_path / f"labels{suffix}"
    done = run_job(Predict(), model, [str(write_fasta(tmp_path / "in.fa", records))], output)
    rows = read_rows(output)
    assert done["rows"] == len(rows) == len(records)
    assert [row["id"] for row in rows] == [name for name, _ in records]
    card, loaded = load_model(model)
    classes = ("cytosol", "membrane", "nucleus")
    for row, (_, text) in zip(rows, records, strict=True):
        wanted = slow_outputs(card, loaded, text)
        # six digits are written
        assert [float(row[f"place:{name}"]) for name in classes] == pytest.approx(
            wanted["place"][0], rel=1e-5, abs=1e-6
        )
        assert row["place"] == classes[int(wanted["place"][0].argmax())]
        assert float(row["fitness"]) == pytest.approx(wanted["fitness"][0, 0], rel=1e-5, abs=1e-5)
        assert row["ss"] == "".join("HEC"[best] for best in wanted["ss"].argmax(1))
        values = [float(word) for word in str(row["disorder"]).split()]
        assert values == pytest.approx(wanted["disorder"][:, 0], rel=1e-4, abs=1e-5)


def test_one_row_a_token_names_residue_and_position(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, records = make_model_directory(readouts=READOUTS), random_records(rng, 20)
    source = str(write_fasta(tmp_path / "in.fa", records))
    run_job(Predict(is_per_token=True, labels=("ss",)), model, [source], tmp_path / "t.csv")
    rows = read_rows(tmp_path / "t.csv")
    wanted = [(name, str(at + 1), residue) for name, text in records for at, residue in enumerate(text)]
    assert [(row["id"], row["position"], row["token"]) for row in rows] == wanted
    assert set(rows[0]) == {"id", "position", "token", "ss", "ss:H", "ss:E", "ss:C"}
    card, loaded = load_model(model)
    likely = np.concatenate([slow_outputs(card, loaded, text)["ss"] for _, text in records])
    got = np.array([[float(row[f"ss:{name}"]) for name in "HEC"] for row in rows])
    assert np.abs(got - likely).max() < 1e-5  # six digits are written


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("parts", [{}, {"width": 1280, "num_layers": 1, "num_heads": 20}], ids=["narrow", "wide"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prediction_is_the_same_alone_and_beside_any_others(
    make_model_directory: MakeModel, rng: np.random.Generator, threads: int, parts: dict
) -> None:
    """From 1,024 inputs on and with several threads, MKL rounds a row by how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    many = Readout(name="kind", classes=tuple(f"{number:03}" for number in range(100)))
    _, model = load_model(make_model_directory(readouts=(*READOUTS, many), **parts))
    sequences = [random_ids(rng, int(n)) for n in rng.integers(1, 80, 23)]
    alone = [Predictor(TrunkRunner(model)).predict(column_of([ids])) for ids in sequences]
    for budget in (1, 200, 100_000):
        together = Predictor(TrunkRunner(model, tokens_per_batch=budget)).predict(column_of(sequences))
        for name, prediction in together.items():
            for row, values in enumerate(prediction.split()):
                assert np.array_equal(values, alone[row][name].values), (name, row, budget)
    torch.set_num_threads(before)


def test_a_long_sequence_is_labelled_to_its_end(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(readouts=READOUTS, position=Learned(max_positions=34, offset=2))
    records = [("long", random_protein(rng, 150, 151)), ("short", random_protein(rng, 20, 21))]
    run_job(Predict(), model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "l.csv")
    assert [len(row["ss"]) for row in read_rows(tmp_path / "l.csv")] == [150, 20]


def test_what_cannot_work_leaves_no_file(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, plain = make_model_directory(readouts=READOUTS), make_model_directory("plain")
    source = str(write_fasta(tmp_path / "in.fa", random_records(rng, 5)))
    bad = str(write_fasta(tmp_path / "bad.fa", [*random_records(rng, 40), ("b", "MK1")]))
    with pytest.raises(ConfigError, match="was not trained on any"):
        run_job(Predict(), plain, [source], tmp_path / "o.csv")
    with pytest.raises(ConfigError, match=r"\.csv, \.tsv, \.parquet"):
        run_job(Predict(), model, [source], tmp_path / "o.txt")
    with pytest.raises(ConfigError, match="one of ss, disorder, place, fitness"):
        run_job(Predict(labels=("colour",)), model, [source], tmp_path / "o.csv")
    with pytest.raises(ConfigError, match="labels of records only"):
        run_job(Predict(labels=("place",), is_per_token=True), model, [source], tmp_path / "o.csv")
    with pytest.raises(DataError, match=r"bad\.fa:82"):
        run_job(Predict(), model, [bad], tmp_path / "o.csv")
    assert not list(tmp_path.glob("o.*"))
    done = run_job(Predict(is_skipping=True), model, [bad], tmp_path / "o.csv")
    assert (done["records"], done["refused"]["count"]) == (40, 1)
