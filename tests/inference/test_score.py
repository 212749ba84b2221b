"""Scoring in the loop that every job shares: it goes on where it was stopped, and equal records are scored once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from small_models import random_protein, records_with_repeats, write_fasta

from meristem.errors import ConfigError
from meristem.inference.run import run_job
from meristem.inference.score import RunningScore, Score
from meristem.scoring.likelihood import LikelihoodOptions

MakeModel = Callable[..., Path]


class Killed(BaseException):
    """Like a power cut, but it can be caught by the test."""


@pytest.mark.parametrize("scorer", ["likelihood", "contacts"])
def test_a_stopped_run_goes_on_and_writes_what_an_unbroken_one_writes(
    scorer: str,
    tmp_path: Path,
    make_model_directory: MakeModel,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [(f"p{row % 40}", random_protein(rng, 20)) for row in range(50)]
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records))
    suffix = ".csv" if scorer == "likelihood" else ".npz"
    plots = [str(tmp_path / name) if suffix == ".npz" else "" for name in ("plots", "plots2")]
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    real, calls, dies_at = RunningScore.rows, 0, -1

    def dying(self: RunningScore, *args: object) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(RunningScore, "rows", dying)
    run_job(Score(scorer=scorer, plots=plots[0]), model, [source], whole)
    num_chunks, calls, dies_at = calls, 0, 3
    options = Score(scorer=scorer, plots=plots[1], tokens_per_batch=77)
    with pytest.raises(Killed):
        run_job(options, model, [source], out)
    assert not out.exists()
    manifest = run_job(options, model, [source], out)
    assert calls - 3 == num_chunks - 2 > 0, "the last leg costs only what was left"
    assert manifest["complete"] is True
    assert not (tmp_path / f"out{suffix}.parts").exists()
    if suffix == ".csv":
        assert out.read_bytes() == whole.read_bytes()
        return
    with np.load(out) as got, np.load(whole) as wanted:
        assert list(got) == list(wanted)
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    drawn = [{path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in plots]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 50


def test_equal_records_are_scored_once(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    pool = [random_protein(rng) for _ in range(7)]
    records = [(f"p{row}", pool[row % 7]) for row in range(40)]
    output = tmp_path / "o.csv"
    manifest = run_job(Score(), make_model_directory(), [str(write_fasta(tmp_path / "in.fa", records))], output)
    assert (manifest["records"], manifest["computed"]) == (40, 7)
    found = pa.csv.read_csv(output)
    assert found["id"].to_pylist() == [name for name, _ in records]
    assert found["log_likelihood"].to_pylist()[:7] * 5 == found["log_likelihood"].to_pylist()[:35]


def test_progress_ends_at_what_there_was_to_do(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    """Exact likelihoods run a record once for each of its tokens, and progress counts them all."""

    class Counted:
        total, records, tokens = 0, 0, 0
        steps = 0

        def chose(self, device: str, precision: str, tokens_per_batch: int) -> None: ...

        def skipped(self, records: int, tokens: int) -> None: ...

        def found(self, records: int | None, tokens: int | None) -> None:
            self.total = tokens or 0

        def advance(self, records: int, tokens: int) -> None:
            self.records, self.tokens, self.steps = self.records + records, self.tokens + tokens, self.steps + 1

    lengths = [*rng.integers(1, 50, 20), 90]
    records = [(f"p{row}", "".join(rng.choice(list("ACDE"), n))) for row, n in enumerate(lengths)]
    source = str(write_fasta(tmp_path / "in.fa", records))
    model = make_model_directory()
    for number, (one_pass, budget) in enumerate([(False, 128), (True, 128), (False, 4096)]):
        report = Counted()
        options = Score(scorer_options=LikelihoodOptions(one_pass=one_pass), tokens_per_batch=budget)
        run_job(options, model, [source], tmp_path / f"{number}.csv", report)
        assert report.records == 21
        assert report.tokens == report.total == sum(n + 2 if one_pass else n * (n + 2) for n in lengths)
        if budget == 128 and not one_pass:
            assert report.steps > 90, "a long record shows progress before its end"


def test_another_runs_output_is_refused(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    output = tmp_path / "o.csv"
    run_job(Score(), model, [source], output)
    before = output.read_bytes()
    other = Score(scorer_options=LikelihoodOptions(one_pass=True))
    with pytest.raises(ConfigError, match="--overwrite"):
        run_job(other, model, [source], output)
    assert output.read_bytes() == before
    with pytest.raises(ConfigError, match="--scorer must be one of likelihood"):
        run_job(Score(scorer="no"), model, [source], output)
