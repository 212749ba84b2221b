"""Records of several inputs: which column is which, what is read, and what makes two records the same."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lines import TOKENIZER, LinesReader, random_payloads

from meristem.data.reading.reader import Reader
from meristem.data.records import ReadOptions, Refusal, Source, batch_of, columns_of, record_at
from meristem.data.store import RecordStore
from meristem.errors import ConfigError, DataError
from meristem.types import INPUT, Record
from meristem_domains.protein import domain as protein
from meristem_domains.vision import domain as vision

PAIR = ("source", "target")


@pytest.mark.parametrize(
    ("said", "inputs", "columns"),
    [
        ("", (INPUT,), {INPUT: ""}),
        ("seq", (INPUT,), {INPUT: "seq"}),
        ("a=b", (INPUT,), {INPUT: "a=b"}),
        ("input=seq", (INPUT,), {INPUT: "seq"}),
        (["source=a", "target=b=c"], PAIR, {"source": "a", "target": "b=c"}),
        ({"target": "b"}, PAIR, {"source": "", "target": "b"}),
        ([], PAIR, {"source": "", "target": ""}),
    ],
)
def test_a_column_is_said_by_its_name_or_for_each_input(said, inputs, columns):
    found = columns_of(said, inputs)
    assert list(found.items()) == list(columns.items())


@pytest.mark.parametrize(
    ("said", "inputs", "message"),
    [
        ("seq", PAIR, r"one of source, target \(as in --column source=COLUMN; .*\{source: COLUMN\}\); got 'seq'"),
        (["other=seq"], PAIR, "got 'other=seq'"),
        ({"other": "seq"}, PAIR, "one of source, target; got 'other'"),
        (["source=a", "source=b"], PAIR, "'source' must be said once; got 'a' and 'b'"),
        (["a", "b"], (INPUT,), "said once; got 'a' and 'b'"),
    ],
)
def test_columns_that_fit_no_input_are_refused(said, inputs, message):
    with pytest.raises(ConfigError, match=message):
        columns_of(said, inputs)


def write_pairs(path: Path, first: list[str], second: list[str], names: tuple[str, str]) -> Source:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({names[0]: first, names[1]: second, "g": list(range(len(first)))}), path)
    else:
        rows = [f"{a},{b},{i}" for i, (a, b) in enumerate(zip(first, second))]
        path.write_text("\n".join([",".join([*names, "g"]), *rows, ""]))
    return Source(str(path))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("names", [PAIR, ("sequence", "target"), ("x", "y")])
def test_a_table_of_pairs_gives_both_inputs_and_the_group(kind, names, tmp_path, rng):
    first, second = (random_payloads(rng, 20) for _ in range(2))
    source = write_pairs(tmp_path / f"x.{kind}", first, second, names)
    columns = dict(zip(PAIR, ("", "") if names[1] == "target" else names))
    options = ReadOptions(columns, group_column="g", batch_bytes=100)
    store = RecordStore.build(protein.reader, [source], options, name="protein", cache_dir=tmp_path / "cache")
    assert store.inputs == PAIR
    for i, record in enumerate(store.records(np.arange(20))):
        assert record.inputs == {"source": first[i], "target": second[i]}
        assert record.group == str(i)
    assert store.token_lengths(TOKENIZER, name="target").tolist() == [len(payload) + 2 for payload in second]
    assert store.token_lengths(TOKENIZER, name="source").tolist() == [len(payload) + 2 for payload in first]
    with pytest.raises(ValueError, match="too many values"):
        _ = store[0].payload


def test_both_inputs_are_checked_and_a_foreign_one_is_taken_as_it_stands(tmp_path):
    source = write_pairs(tmp_path / "x.csv", ["MK V", "MK", "MK7", "MK"], ["MKV", "a 7", "MK", ""], PAIR)
    refused: list[Refusal] = []
    options = ReadOptions(dict.fromkeys(PAIR, ""), on_error=refused.append)
    [batch] = protein.reader.read(source, options)
    assert record_at(batch, 0).inputs == {"source": "MKV", "target": "MKV"}
    assert sorted((one.line, one.reason.split(" is no")[0].split(":")[0]) for one in refused) == [
        (3, "'7'"),
        (4, "'7'"),
        (5, "empty record (nothing in column 'target')"),
    ]
    foreign = ReadOptions(dict.fromkeys(PAIR, ""), ("target",), on_error=lambda _: None)
    [batch] = protein.reader.read(source, foreign)
    assert [record_at(batch, row).inputs["target"] for row in range(2)] == ["MKV", "a 7"]


def test_files_without_columns_have_one_input(tmp_path, rng):
    (tmp_path / "x.fasta").write_text(">a\nMKV\n")
    source = Source(str(tmp_path / "x.fasta"))
    [batch] = protein.reader.read(source, ReadOptions({"source": ""}))
    assert record_at(batch, 0).inputs == {"source": "MKV"}
    with pytest.raises(DataError, match=r"x\.fasta:1: no column for the input 'target': FASTA has none"):
        list(protein.reader.read(source, ReadOptions(dict.fromkeys(PAIR, ""))))
    with pytest.raises(DataError, match=r"x\.fasta:1: no column 'patient': FASTA has none"):
        list(protein.reader.read(source, ReadOptions(group_column="patient")))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"source": "", "target": ""}, r"x\.csv:1: .* the input 'source', named source or sequence .*source=COLUMN"),
        ({"source": "x", "target": ""}, r"x\.csv:1: .* the input 'target', named target; columns: x, y, g"),
        ({"source": "x", "target": "z"}, r"x\.csv:1: no column 'z'; columns: x, y, g"),
    ],
)
def test_an_input_without_a_column_is_named_with_the_columns_there_are(columns, message, tmp_path):
    source = write_pairs(tmp_path / "x.csv", ["MK"], ["MK"], ("x", "y"))
    with pytest.raises(DataError, match=message):
        list(protein.reader.read(source, ReadOptions(columns)))


def test_pictures_and_their_captions_are_two_inputs(tmp_path, rng):
    from PIL import Image

    for i in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "x.csv").write_text("image,caption\n" + "".join(f"{i}.png,a picture {i}\n" for i in range(3)))
    options = ReadOptions({"image": "", "caption": ""}, ("caption",))
    [batch] = vision.reader.read(Source(str(tmp_path / "x.csv")), options)
    for i in range(3):
        record = record_at(batch, i)
        assert record.id == f"{i}.png"
        assert record.inputs == {"image": (tmp_path / f"{i}.png").read_bytes(), "caption": f"a picture {i}"}
    with pytest.raises(DataError, match=r"x\.csv:2: a picture 0: cannot be read"):
        list(vision.reader.read(Source(str(tmp_path / "x.csv")), ReadOptions({"image": "", "caption": ""})))


def test_records_in_memory_are_by_value_and_come_back(rng):
    records = [
        Record(f"r{i}", {"source": a, "target": b}, {"y": str(i)} if i % 2 else {}, f"x:{i}", "ab"[i % 2])
        for i, (a, b) in enumerate(zip(random_payloads(rng, 9), random_payloads(rng, 9)))
    ]
    store = RecordStore.of(records)
    assert store.records(np.arange(9)) == records
    assert [store.where(i) for i in range(9)] == [record.source for record in records]


def test_pairs_are_the_same_when_both_of_their_inputs_are(rng):
    a, b = random_payloads(rng, 2, 10, 20)
    pairs = [(a, b), (a.lower(), b), (b, a), (a, a), (a + b, b), (a, b)]
    records = [Record("r", dict(zip(PAIR, pair))) for pair in pairs]
    hashes = RecordStore.of(records, LinesReader()).payload_hashes(3)
    assert hashes[0] == hashes[1] == hashes[5]
    assert len(set(hashes)) == 4
    as_they_are = RecordStore.of(records).payload_hashes(3)
    assert as_they_are[0] == as_they_are[5] != as_they_are[1]  # the mutant: a reader without `canonical`


def test_a_reader_without_slices_says_so():
    class Whole(Reader):
        def read(self, source, options):
            yield batch_of(pa.array(["a"]), pa.array(["MK"], pa.large_string()), source.name, [1])

    assert Whole().files(Source("x"), ReadOptions()) == []
    assert Whole().canonical("Mk") == b"Mk"
    assert Whole().canonical(b"\0Mk") == b"\0Mk"
    with pytest.raises(DataError, match="Whole reads whole payloads"):
        Whole().fetch([])
