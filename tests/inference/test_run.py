"""Files in, parts and a manifest out: in order, checked first, in a flat amount of memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from small_models import READOUTS, RESIDUES, records_with_repeats, snapshot, write_fasta

from meristem.errors import CheckpointError, ConfigError, DataError
from meristem.inference.chunks import ChunkReader
from meristem.inference.embed import Embed
from meristem.inference.encoding import Reading
from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.formats import read_embeddings
from meristem.inference.predict import Predict
from meristem.inference.run import run_job
from meristem.inference.score import Score
from meristem.model.config import Learned
from meristem.model_directory import load_model
from meristem.types import INPUT

MakeModel = Callable[..., Path]


def slow_vectors(model: Path, sequences: list[str], pool: str, layer: int = -1) -> list[np.ndarray]:
    """The oracle: one sequence at a time, straight from the trunk."""
    card, loaded = load_model(model)
    embedder = Embedder(TrunkRunner(loaded, layer), pool)
    return [
        embedder.embed(card.tokenizer.encode_column(pa.array([text], pa.large_string()))).squeeze(
            0 if pool != "none" else ()
        )
        for text in sequences
    ]


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "none"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_every_record_has_its_vector_in_input_order(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, pool: str, layer: int
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng)
    manifest = run_job(
        Embed(pool=pool, layer=layer), model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out"
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
    run_job(
        Embed(pool="none"), make_model_directory(), [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out"
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
    manifest = run_job(
        Embed(), make_model_directory(), [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out"
    )
    assert sum(computed) == manifest["computed"] == len({text for _, text in records})


@pytest.mark.parametrize("form", ["h5", "npz"])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_one_file_holds_what_the_parts_hold(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, form: str, pool: str
) -> None:
    source = write_fasta(tmp_path / "in.fa", records_with_repeats(rng, 40))
    out = tmp_path / "out"
    manifest = run_job(Embed(pool=pool, format=form), make_model_directory(), [str(source)], out)
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
        run_job(Embed(), make_model_directory(), [good, str(tmp_path / "in.fa")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_records_are_named_and_the_rest_is_unchanged(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, records = make_model_directory(), records_with_repeats(rng, 50)
    bad = sorted(rng.choice(50, 7, replace=False).tolist())
    spoiled = [(name, text[:-1] + "?" if row in bad else text) for row, (name, text) in enumerate(records)]
    source = str(write_fasta(tmp_path / "in.fa", spoiled))
    manifest = run_job(Embed(is_skipping=True), model, [source], tmp_path / "out")
    kept = [record for row, record in enumerate(records) if row not in bad]
    run_job(Embed(), model, [str(write_fasta(tmp_path / "kept.fa", kept))], tmp_path / "kept")
    got, wanted = read_embeddings(tmp_path / "out"), read_embeddings(tmp_path / "kept")
    assert got.ids.tolist() == wanted.ids.tolist()
    assert np.array_equal(got.values, wanted.values)
    assert manifest["refused"]["count"] == 7
    # a header line and a sequence line each
    assert [refusal["line"] for refusal in manifest["refused"]["records"]] == [2 * row + 2 for row in bad]


def test_a_part_whose_records_were_all_refused_leaves_no_hole(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, records = make_model_directory(readouts=READOUTS), records_with_repeats(rng, 20)
    bad = [(f"bad{row}", "MK?") for row in range(16)]  # as many as a chunk holds
    source = str(write_fasta(tmp_path / "in.fa", [*bad, *records[:16], *bad, *records[16:]]))
    wanted = [name for name, _ in records]
    run_job(Embed(is_skipping=True), model, [source], tmp_path / "out")
    assert read_embeddings(tmp_path / "out").ids.tolist() == wanted
    for suffix, read in ((".csv", pa.csv.read_csv), (".parquet", pq.read_table)):
        run_job(Predict(is_skipping=True), model, [source], tmp_path / f"o{suffix}")
        run_job(Score(is_skipping=True), model, [source], tmp_path / f"s{suffix}")
        for name in "os":
            table = read(tmp_path / f"{name}{suffix}")
            assert table["id"].to_pylist() == wanted
            assert len(table.column_names) > 2


def test_replaced_symbols_are_counted(tmp_path: Path, make_model_directory: MakeModel) -> None:
    source = write_fasta(tmp_path / "in.fa", [("a", "MJJK*"), ("b", "mjk")])
    manifest = run_job(Embed(), make_model_directory(), [str(source)], tmp_path / "out")
    assert manifest["replaced"] == {"J>X": 3, "*>X": 1}


def test_a_long_sequence_is_averaged_over_windows_never_truncated(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model = make_model_directory(position=Learned(max_positions=42, offset=2))  # 40 tokens, 38 residues
    records = [(f"p{n}", RESIDUES[rng.integers(0, 20, n)].tobytes().decode()) for n in (38, 39, 76, 200, 3)]
    manifest = run_job(Embed(pool="none"), model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out")
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
    run_job(Embed(), model, [str(write_fasta(tmp_path / "longer.fa", longer))], tmp_path / "longer")
    run_job(Embed(), model, [str(tmp_path / "in.fa")], tmp_path / "pooled")
    changes = np.abs(read_embeddings(tmp_path / "longer").values - read_embeddings(tmp_path / "pooled").values).max(1)
    assert (changes > 0).all(), "a residue at the very end must be seen"


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
        run_job(Embed(), model, [str(write_fasta(tmp_path / "in.fa", records))], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False


def test_chunks_depend_on_the_records_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    from meristem.data.records import ReadOptions
    from meristem_domains.protein import domain

    records = records_with_repeats(rng, 80)
    source = str(write_fasta(tmp_path / "in.fa", records))
    reading = Reading({INPUT: domain.tokenizer()})
    found = [
        [(chunk.ids.to_pylist(), chunk.digest) for chunk in reader]
        for batch_bytes in (1, 100, 1 << 20)
        for reader in [ChunkReader(domain, reading, [source], ReadOptions(batch_bytes=batch_bytes), max_symbols=200)]
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
        run_job(Embed(**options), make_model_directory(), [source], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        run_job(Embed(), tmp_path / "nowhere", [source], tmp_path / "out")


@pytest.mark.slow
def test_two_worker_processes_give_the_same_rows(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    model, source = make_model_directory(), str(write_fasta(tmp_path / "in.fa", records_with_repeats(rng)))
    run_job(Embed(), model, [source], tmp_path / "one")
    run_job(Embed(devices=2), model, [source], tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
