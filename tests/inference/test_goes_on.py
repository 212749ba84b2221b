"""A run that is stopped or killed goes on, and what it has finished stays."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_models import records_with_repeats, snapshot, write_fasta

from meristem.errors import ConfigError, DataError
from meristem.inference import output as writer
from meristem.inference.embed import Embed
from meristem.inference.engine import Embedder
from meristem.inference.formats import iter_embeddings, read_embeddings
from meristem.inference.run import run_job

MakeModel = Callable[..., Path]


class Killed(BaseException):
    """Like a power cut, but it can be caught by the test."""


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_a_run_goes_on_where_it_was_stopped_and_computes_only_what_is_left(
    tmp_path: Path,
    make_model_directory: MakeModel,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng)))
    options = Embed(pool=pool)
    embed = Embedder.embed
    calls, last = 0, 0

    def dying(self: Embedder, *args: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        return embed(self, *args)

    monkeypatch.setattr(Embedder, "embed", dying)
    run_job(options, model, [source], tmp_path / "whole")
    num_calls = calls  # a part of copies alone needs none
    calls, last = 0, 3
    with pytest.raises(Killed):
        run_job(options, model, [source], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False
    with pytest.raises(DataError, match="stopped before its end"):
        read_embeddings(tmp_path / "out")
    assert len(read_embeddings(tmp_path / "out", allow_incomplete=True)) == 32
    calls, last = 0, 0
    manifest = run_job(Embed(pool=pool, tokens_per_batch=77), model, [source], tmp_path / "out")
    assert calls == num_calls - 2, "the last leg costs only what was left"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert manifest["complete"] is True
    calls = 0
    run_job(options, model, [source], tmp_path / "out")
    assert calls == 0, "a complete run computes nothing again"


def test_another_runs_output_is_refused_and_not_touched(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, other = make_model_directory(), make_model_directory("other")
    records = records_with_repeats(rng, 20)
    source = str(write_fasta(tmp_path / "in.fa", records))
    changed = str(write_fasta(tmp_path / "changed.fa", [*records[:-1], ("x", "MKV")]))
    renamed = str(write_fasta(tmp_path / "renamed.fa", records))
    out = tmp_path / "out"
    run_job(Embed(), model, [source], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for arguments, options, reason in (
        ((model, [source]), Embed(pool="max"), "--pool mean"),
        ((model, [source]), Embed(layer=1), "--layer 2"),
        ((model, [source]), Embed(precision="bf16"), "--precision fp32"),
        ((other, [source]), Embed(), "another model"),
        ((model, [changed]), Embed(), "another input"),
        ((model, [source, source]), Embed(), "another input"),
    ):
        with pytest.raises(ConfigError, match=reason):
            run_job(options, *arguments, out)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run_job(Embed(), model, [renamed], out)  # the same records under another name are the same input


def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    for output in (tmp_path / "home", tmp_path / "in.fa"):
        with pytest.raises(ConfigError, match="--output"):
            run_job(Embed(), model, [source], output)
    with pytest.raises(ConfigError, match="--format h5"):
        run_job(Embed(), model, [source], tmp_path / "vectors.h5")
    assert not (tmp_path / "vectors.h5").exists()


def test_standard_input_keeps_what_is_finished(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng, 50)
    good = write_fasta(tmp_path / "good.fa", records)
    bad = write_fasta(tmp_path / "bad.fa", [*records[:40], ("bad", "MK1"), *records[40:]])

    class Piped:
        """Standard input with these bytes."""

        closed = False

        def __init__(self, path: Path):
            self.buffer = path.open("rb")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin := Piped(bad))
        # a batch of one record, so that the good ones are read before the bad one is seen
        from meristem.data.records import ReadOptions

        with pytest.raises(DataError, match="<stdin>:82"):
            run_job(Embed(read=ReadOptions(batch_bytes=64)), model, ["-"], tmp_path / "out")
        stdin.buffer.close()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["parts"]) == (False, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin := Piped(good))
        manifest = run_job(Embed(), model, ["-"], tmp_path / "out")
        stdin.buffer.close()
    assert manifest["complete"] is True
    run_job(Embed(), model, [str(good)], tmp_path / "file")
    assert snapshot_values(tmp_path / "out") == snapshot_values(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin := Piped(write_fasta(tmp_path / "o.fa", records_with_repeats(rng, 50))))
        with pytest.raises(ConfigError, match="another input"):
            run_job(Embed(), model, ["-"], tmp_path / "out")
        stdin.buffer.close()


def snapshot_values(folder: Path) -> list[bytes]:
    return [read.values.tobytes() for read in iter_embeddings(folder)]


def test_a_full_disk_is_one_line_and_finished_parts_stay(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng)))
    write = pq.write_table
    calls = 0

    def fill(table: pa.Table, path: Path, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            path.write_bytes(b"half a part")
            raise OSError(28, "No space left on device")
        write(table, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer.pq, "write_table", fill)
        with pytest.raises(DataError, match="no space left"):
            run_job(Embed(), model, [source], tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False
    run_job(Embed(), model, [source], tmp_path / "out")
    run_job(Embed(), model, [source], tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_second_process_is_kept_out(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    first = writer.OutputDirectory(tmp_path / "out")
    with first.claimed(), pytest.raises(ConfigError, match="another process"):
        run_job(Embed(), model, [source], tmp_path / "out")
    run_job(Embed(), model, [source], tmp_path / "out")
