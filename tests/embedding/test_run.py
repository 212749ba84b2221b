"""Files in, parts and a manifest out: in order, checked first, resumable, in a flat amount of memory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_models import RESIDUES, random_protein, write_fasta

from meristem.embedding import chunks, run, writer
from meristem.embedding.chunks import ChunkReader
from meristem.embedding.engine import POOLS, Embedder, TrunkRunner
from meristem.embedding.formats import iter_embeddings, read_embeddings
from meristem.embedding.run import EmbedOptions, embed_files
from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.model.config import Learned
from meristem.model_directory import load_model

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in little time."""
    monkeypatch.setattr(chunks, "CHUNK_RECORDS", 16)
    monkeypatch.setattr(run, "CHUNK_RECORDS", 16)


def records_with_repeats(rng: np.random.Generator, count: int = 90) -> list[tuple[str, str]]:
    """Ids and sequences, both with repeats near and far."""
    pool = [random_protein(rng) for _ in range(count * 2 // 3)]
    return [(f"p{rng.integers(count)}", pool[rng.integers(len(pool))]) for _ in range(count)]


def slow_vectors(model: Path, sequences: list[str], pool: str, layer: int = -1) -> list[np.ndarray]:
    """The oracle: one sequence at a time, straight from the trunk."""
    card, loaded = load_model(model)
    embedder = Embedder(TrunkRunner(loaded, card.tokenizer.num_special, layer), POOLS[pool])
    return [
        embedder.embed(card.tokenizer.encode_column(pa.array([text], pa.large_string()))).squeeze(
            0 if pool != "none" else ()
        )
        for text in sequences
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Rows of every part."""
    return {part.name: str(pq.read_table(part).to_pydict()).encode() for part in sorted(folder.glob("part-*"))}


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "none"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_every_record_has_its_vector_in_input_order(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, pool: str, layer: int
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng)
    manifest = embed_files(
        model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out", EmbedOptions(pool=pool, layer=layer)
    )
    got = read_embeddings(tmp_path / "out")
    wanted = slow_vectors(model, [text for _, text in records], pool, layer)
    assert got.ids.tolist() == [name for name, _ in records]
    for row, (vector, want) in enumerate(zip(got, wanted, strict=True)):
        assert np.array_equal(vector, want), row
    assert manifest["complete"] is True
    assert manifest["parts"] == 6
    assert (manifest["records"], manifest["tokens"]) == (len(records), sum(len(text) for _, text in records))


def test_vectors_of_tokens_stand_beside_their_residues(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    records = records_with_repeats(rng, 20)
    embed_files(
        make_model_directory(),
        [str(write_fasta(tmp_path / "in.fa", records))],
        tmp_path / "out",
        EmbedOptions(pool="none"),
    )
    table = pa.concat_tables(pq.read_table(part) for part in sorted((tmp_path / "out").glob("part-*")))
    assert ["".join(tokens) for tokens in table["tokens"].to_pylist()] == [text for _, text in records]
    assert table["length"].to_pylist() == [len(text) for _, text in records]
    assert pa.types.is_fixed_size_list(table.schema.field("embedding").type.value_type)


def test_equal_sequences_are_computed_once(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_with_repeats(rng)
    computed: list[int] = []
    embed = Embedder.embed
    monkeypatch.setattr(
        Embedder, "embed", lambda self, column, *a: computed.append(len(column)) or embed(self, column, *a)
    )
    manifest = embed_files(make_model_directory(), [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out")
    assert sum(computed) == manifest["computed"] == len({text for _, text in records})


@pytest.mark.parametrize("form", ["h5", "npz"])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_one_file_holds_what_the_parts_hold(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, form: str, pool: str
) -> None:
    source = write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 40))
    out = tmp_path / "out"
    manifest = embed_files(make_model_directory(), [str(source)], out, EmbedOptions(pool=pool, format=form))
    parts = read_embeddings(out)
    for path in (out / manifest["file"], out):
        got = read_embeddings(path)
        assert got.ids.tolist() == parts.ids.tolist()
        assert np.array_equal(got.values, parts.values)
        assert np.array_equal(got.offsets, parts.offsets)
        assert got.is_pooled == (pool != "none")
        for part in out.glob("part-*"):
            part.unlink()
    if form == "h5":
        with h5py.File(out / manifest["file"]) as file:  # as biotrainer reads it
            assert [file[str(row)].attrs["original_id"] for row in range(len(file))] == parts.ids.tolist()
            assert np.array_equal(file["3"][()], parts[3])


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
    options = EmbedOptions(pool=pool)
    embed_files(model, [source], tmp_path / "whole", options)
    embed = Embedder.embed
    calls = 0

    def dying(self: Embedder, *args: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return embed(self, *args)

    monkeypatch.setattr(Embedder, "embed", dying)
    with pytest.raises(Killed):
        embed_files(model, [source], tmp_path / "out", options)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False
    with pytest.raises(DataError, match="stopped before its end"):
        read_embeddings(tmp_path / "out")
    assert len(read_embeddings(tmp_path / "out", allow_incomplete=True)) == 32
    calls = 3
    manifest = embed_files(model, [source], tmp_path / "out", EmbedOptions(pool=pool, tokens_per_batch=77))
    assert calls - 3 == 4, "the last leg costs only what was left"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert manifest["complete"] is True
    calls = 3
    embed_files(model, [source], tmp_path / "out", options)
    assert calls == 3, "a complete run computes nothing again"


DRIVER = """
import sys
from meristem.embedding import chunks, engine, run
chunks.CHUNK_RECORDS = run.CHUNK_RECORDS = 16
slow = engine.Embedder.embed
import time
def embed(self, *args):
    time.sleep(.02)
    return slow(self, *args)
engine.Embedder.embed = embed
from meristem.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_five_kills_at_random_moments_leave_the_rows_of_an_unbroken_run(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory()
    source = str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 1200)))
    embed_files(model, [source], tmp_path / "whole")
    command = [sys.executable, "-c", DRIVER, "embed", str(model), source, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(5):
        had = len(list(tmp_path.glob("out/part-*.parquet")))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # wait until it works, whatever the start takes, then strike at any moment: also while a part is written
        while process.poll() is None and len(list(tmp_path.glob("out/part-*.parquet"))) <= had:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 5
    done = len(list(tmp_path.glob("out/part-*.parquet")))
    assert 0 < done < 75, "the input must be long enough for five kills"
    last = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not list(tmp_path.glob("out/*.tmp"))


def test_another_runs_output_is_refused_and_not_touched(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, other = make_model_directory(), make_model_directory("other")
    records = records_with_repeats(rng, 20)
    source = str(write_fasta(tmp_path / "in.fa", records))
    changed = str(write_fasta(tmp_path / "changed.fa", [*records[:-1], ("x", "MKV")]))
    renamed = str(write_fasta(tmp_path / "renamed.fa", records))
    out = tmp_path / "out"
    embed_files(model, [source], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for arguments, options, reason in (
        ((model, [source]), EmbedOptions(pool="max"), "--pool mean"),
        ((model, [source]), EmbedOptions(layer=1), "--layer 2"),
        ((model, [source]), EmbedOptions(precision="bf16"), "--precision fp32"),
        ((other, [source]), EmbedOptions(), "another model"),
        ((model, [changed]), EmbedOptions(), "another input"),
        ((model, [source, source]), EmbedOptions(), "another input"),
    ):
        with pytest.raises(ConfigError, match=reason):
            embed_files(*arguments, out, options)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    embed_files(model, [renamed], out)  # the same records under another name are the same input


def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    for output in (tmp_path / "home", tmp_path / "in.fa"):
        with pytest.raises(ConfigError, match="--output"):
            embed_files(model, [source], output)
    with pytest.raises(ConfigError, match="--format h5"):
        embed_files(model, [source], tmp_path / "vectors.h5")
    assert not (tmp_path / "vectors.h5").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (">a\nMKT\n>b\nMK1\n", r"in\.fa:4: '1'"),
        (">a\nMKT\n>b\n>c\nMKV\n", r"in\.fa:3"),
        ("", "empty"),
        ("no fasta at all\n", r"in\.fa"),
        (None, "no such file"),
    ],
)
def test_a_bad_input_leaves_nothing_behind(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, content: str | None, reason: str
) -> None:
    good = str(write_fasta(tmp_path / "good.fa", records_with_repeats(rng, 40)))
    if content is not None:
        (tmp_path / "in.fa").write_text(content)
    with pytest.raises(DataError, match=reason):
        embed_files(make_model_directory(), [good, str(tmp_path / "in.fa")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_records_are_named_and_the_rest_is_unchanged(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng, 50)
    bad = sorted(rng.choice(50, 7, replace=False).tolist())
    spoiled = [(name, text[:-1] + "?" if row in bad else text) for row, (name, text) in enumerate(records)]
    source = str(write_fasta(tmp_path / "in.fa", spoiled))
    manifest = embed_files(model, [source], tmp_path / "out", EmbedOptions(is_skipping=True))
    kept = [record for row, record in enumerate(records) if row not in bad]
    embed_files(model, [str(write_fasta(tmp_path / "kept.fa", kept))], tmp_path / "kept")
    got, wanted = read_embeddings(tmp_path / "out"), read_embeddings(tmp_path / "kept")
    assert got.ids.tolist() == wanted.ids.tolist()
    assert np.array_equal(got.values, wanted.values)
    assert manifest["refused"]["count"] == 7
    # a header line and a sequence line each
    assert [refusal["line"] for refusal in manifest["refused"]["records"]] == [2 * row + 2 for row in bad]


def test_replaced_symbols_are_counted(tmp_path: Path, make_model_directory: MakeModel) -> None:
    source = write_fasta(tmp_path / "in.fa", [("a", "MJJK*"), ("b", "mjk")])
    manifest = embed_files(make_model_directory(), [str(source)], tmp_path / "out")
    assert manifest["replaced"] == {"J>X": 3, "*>X": 1}


def test_a_long_sequence_is_averaged_over_windows_never_truncated(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(position=Learned(max_positions=42, offset=2))  # 40 tokens, 38 residues
    records = [(f"p{n}", RESIDUES[rng.integers(0, 20, n)].tobytes().decode()) for n in (38, 39, 76, 200, 3)]
    manifest = embed_files(
        model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out", EmbedOptions(pool="none")
    )
    assert manifest["windowed"]["records"] == 3
    got = read_embeddings(tmp_path / "out")
    assert [len(vectors) for vectors in got] == [38, 39, 76, 200, 3]
    # the slow way for two windows: 39 residues are 0..38 and 1..39
    text = records[1][1]
    left, right = slow_vectors(model, [text[:38], text[1:]], "none")
    total, count = np.zeros((39, 32)), np.zeros((39, 1))
    for start, window in ((0, left), (1, right)):
        total[start : start + 38] += window
        count[start : start + 38] += 1
    # sums in double here and single there
    assert np.abs(got[1] - total / count).max() < 1e-6
    longer = [(name, text + "W") for name, text in records]
    embed_files(model, [str(write_fasta(tmp_path / "longer.fa", longer))], tmp_path / "longer", EmbedOptions())
    embed_files(model, [str(tmp_path / "in.fa")], tmp_path / "pooled", EmbedOptions())
    changes = np.abs(read_embeddings(tmp_path / "longer").values - read_embeddings(tmp_path / "pooled").values).max(1)
    assert (changes > 0).all(), "a residue at the very end must be seen"


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
            embed_files(model, ["-"], tmp_path / "out", EmbedOptions(read=ReadOptions(batch_bytes=64)))
        stdin.buffer.close()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["parts"]) == (False, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin := Piped(good))
        manifest = embed_files(model, ["-"], tmp_path / "out")
        stdin.buffer.close()
    assert manifest["complete"] is True
    embed_files(model, [str(good)], tmp_path / "file")
    assert snapshot_values(tmp_path / "out") == snapshot_values(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin := Piped(write_fasta(tmp_path / "o.fa", records_with_repeats(rng, 50))))
        with pytest.raises(ConfigError, match="another input"):
            embed_files(model, ["-"], tmp_path / "out")
        stdin.buffer.close()


def snapshot_values(folder: Path) -> list[bytes]:
    return [read.values.tobytes() for read in iter_embeddings(folder)]


def test_a_vector_that_is_not_finite_is_named(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model_directory()
    tensors = load_file(model / "model.safetensors")
    tensors["trunk.embedding.symbols.weight"][23] = torch.inf  # the last residue, C
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    records = [(f"p{i}", "".join(rng.choice(list("LAGVSERT"), 20))) for i in range(40)]
    records[29] = ("odd", "MKCK")
    with pytest.raises(DataError, match=r"in\.fa:59: record 'odd'.*not finite"):
        embed_files(model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False


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
            embed_files(model, [source], tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False
    embed_files(model, [source], tmp_path / "out")
    embed_files(model, [source], tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_second_process_is_kept_out(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    first = writer.OutputDirectory(tmp_path / "out")
    first.claim()
    with pytest.raises(ConfigError, match="another process"):
        embed_files(model, [source], tmp_path / "out")
    first.release()
    embed_files(model, [source], tmp_path / "out")


def test_chunks_depend_on_the_records_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    from meristem.data.records import ReadOptions
    from meristem_domains.protein import domain

    records = records_with_repeats(rng, 80)
    source = str(write_fasta(tmp_path / "in.fa", records))
    found = [
        [(chunk.ids.to_pylist(), chunk.digest) for chunk in reader]
        for batch_bytes in (1, 100, 1 << 20)
        for reader in [
            ChunkReader(domain, domain.tokenizer(), [source], ReadOptions(batch_bytes=batch_bytes), max_symbols=200)
        ]
    ]
    assert found[0] == found[1] == found[2]
    sizes = [sum(len(dict_text) for dict_text in names) for names, _ in found[0]]
    assert len(sizes) > 5
    assert [name for names, _ in found[0] for name in names] == [name for name, _ in records]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer": 3}, "layer must be in 0..2"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be 1 or more"),
        ({"devices": 10_000}, "--devices must be at most"),
        ({"domain": "nonsense"}, "domain must be installed"),
        ({"pool": "median"}, "pool must be one of"),
    ],
)
def test_a_wrong_option_leaves_nothing_behind(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, options: dict, reason: str
) -> None:
    source = str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 5)))
    with pytest.raises(ConfigError, match=reason):
        embed_files(make_model_directory(), [source], tmp_path / "out", EmbedOptions(**options))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        embed_files(tmp_path / "nowhere", [source], tmp_path / "out")


@pytest.mark.slow
def test_two_worker_processes_give_the_same_rows(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng)))
    embed_files(model, [source], tmp_path / "one")
    embed_files(model, [source], tmp_path / "two", EmbedOptions(devices=2))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
