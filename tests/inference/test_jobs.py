"""Every job goes on where it was killed, and owns its output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import READOUTS, random_protein, records_with_repeats, snapshot, write_fasta

from meristem.errors import ConfigError, DataError
from meristem.files import read_json
from meristem.inference.embed import Embed
from meristem.inference.output import OutputDirectory
from meristem.inference.predict import Predict
from meristem.inference.predictor import Predictor
from meristem.inference.run import run_job

MakeModel = Callable[..., Path]


def random_records(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    return [(f"p{i}", random_protein(rng)) for i in range(count)]


def content(output: Path) -> Any:
    """What a finished output holds, without what depends on the clock."""
    return snapshot(output) if output.is_dir() else output.read_bytes()


def test_predicting_goes_on_behind_finished_parts(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_directory(readouts=READOUTS)
    source = str(write_fasta(tmp_path / "in.fa", random_records(rng, 100)))
    run_job(Predict(), model, [source], tmp_path / "whole.csv")
    calls = 0
    predict = Predictor.predict

    def fail_at_fourth(self: Predictor, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(Predictor, "predict", fail_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_job(Predict(), model, [source], tmp_path / "l.csv")
    assert not (tmp_path / "l.csv").exists()
    assert (tmp_path / "l.csv.parts").is_dir()
    run_job(Predict(), model, [source], tmp_path / "l.csv")
    assert calls == 4 + 7 - 3, "seven parts in all, three of them finished"
    assert (tmp_path / "l.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "l.csv.parts").exists()


def test_a_finished_file_is_not_made_again_and_one_of_the_user_is_left_alone(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model_directory(readouts=READOUTS)
    source = str(write_fasta(tmp_path / "in.fa", random_records(rng, 20)))
    output = tmp_path / "l.csv"
    first = run_job(Predict(), model, [source], output)
    assert read_json(tmp_path / "l.csv.manifest.json") == first
    made = output.stat().st_mtime_ns
    assert run_job(Predict(), model, [source], output) == first
    assert output.stat().st_mtime_ns == made
    with pytest.raises(ConfigError, match="is there already"):
        run_job(Predict(labels=("place",)), model, [source], output)
    other = run_job(Predict(labels=("place",), is_overwriting=True), model, [source], output)
    assert other["labels"] == ["place"]
    mine = tmp_path / "mine.csv"
    mine.write_text("my own\n")
    with pytest.raises(ConfigError, match=r"mine\.csv is there already"):
        run_job(Predict(), model, [source], mine)
    with pytest.raises(ConfigError, match="is there already"):
        run_job(Predict(), model, [str(mine), source], mine)
    assert mine.read_text() == "my own\n"


def test_a_second_process_that_writes_one_file_is_kept_out(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(readouts=READOUTS)
    source = str(write_fasta(tmp_path / "in.fa", random_records(rng, 5)))
    first = OutputDirectory(tmp_path / "l.csv.parts")
    with first.claimed(), pytest.raises(ConfigError, match="another process is writing there"):
        run_job(Predict(), model, [source], tmp_path / "l.csv")
    run_job(Predict(), model, [source], tmp_path / "l.csv")


def test_equal_records_are_predicted_once(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(readouts=READOUTS)
    records = records_with_repeats(rng, 120)
    done = run_job(Predict(), model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "l.csv")
    distinct = list(dict.fromkeys(text for _, text in records))
    assert (done["records"], done["computed"]) == (120, len(distinct))
    alone = [(f"q{i}", text) for i, text in enumerate(distinct)]
    run_job(Predict(), model, [str(write_fasta(tmp_path / "alone.fa", alone))], tmp_path / "alone.csv")
    lines = (tmp_path / "alone.csv").read_text().splitlines()[1:]
    rows = {text: line.partition(",")[2] for text, line in zip(distinct, lines, strict=True)}
    wanted = [f"{name},{rows[text]}" for name, text in records]
    assert (tmp_path / "l.csv").read_text().splitlines()[1:] == wanted


@pytest.mark.slow
def test_two_processes_predict_what_one_does(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(readouts=READOUTS)
    source = str(write_fasta(tmp_path / "in.fa", random_records(rng, 60)))
    run_job(Predict(), model, [source], tmp_path / "one.csv")
    run_job(Predict(devices=2), model, [source], tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_a_record_that_cannot_be_used_leaves_nothing(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(readouts=READOUTS)
    source = str(write_fasta(tmp_path / "in.fa", [*random_records(rng, 40), ("b", "MK1")]))
    with pytest.raises(DataError, match=r"in\.fa:82"):
        run_job(Predict(), model, [source], tmp_path / "l.csv")
    assert not list(tmp_path.glob("l.csv*"))


@pytest.mark.slow
@pytest.mark.parametrize("is_skipping", [False, True])
def test_encoding_in_processes_gives_what_one_process_gives(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, is_skipping: bool
) -> None:
    model = make_model_directory(readouts=READOUTS)
    records = [(f"p{i}", random_protein(rng) + ("1" if is_skipping and i % 7 == 3 else "")) for i in range(60)]
    source = str(write_fasta(tmp_path / "in.fa", records))
    done = [run_job(Embed(workers=n, is_skipping=is_skipping), model, [source], tmp_path / f"w{n}") for n in (0, 2)]
    assert content(tmp_path / "w0") == content(tmp_path / "w2")
    assert done[0]["refused"] == done[1]["refused"]
    assert done[0]["run"] == done[1]["run"]
