"""Labels stay text until they are used, whatever table they come from, and only then become classes or numbers."""

import datetime
import decimal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lines import TOKENIZER, random_payloads

from labelled import ready
from meristem.data import labels as labels_module
from meristem.data.labels import LabelColumn, as_text, number_of, sort_classes, text_column
from meristem.data.parts import Part, RunData
from meristem.data.records import ReadOptions, Source
from meristem.data.store import RecordStore
from meristem.errors import DataError
from meristem.model.heads import readouts_of
from meristem.objectives.supervised import Supervised, Target
from meristem.types import IGNORE, Record
from meristem_domains.protein import domain as protein

ODD_WORDS = [
    *("01", "1", "1.10", "1.1", "1e5", "100000", "12345678901234567890", "12345678901234567891", "NA", "None", "nan"),
    *("N/A", "null", "TRUE", "True", "true", "2020-01-02", "-0", "0", "inf", " a", "a", "é", "0110", "1_000", "#N/A"),
]


def build(tmp_path: Path, words: list[str], kind: str, rng: np.random.Generator) -> RecordStore:
    path = tmp_path / f"x.{kind}"
    payloads = random_payloads(rng, len(words))
    if kind == "parquet":
        pq.write_table(pa.table({"sequence": payloads, "y": words}), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("".join(f"{a}{mark}{b}\n" for a, b in zip(["sequence", *payloads], ["y", *words])))
    options = ReadOptions(label_columns=("y",), batch_bytes=200)
    return RecordStore.build(protein.reader, [Source(str(path))], options, name="protein", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_every_word_is_a_class_of_its_own_and_only_an_empty_cell_is_missing(kind, tmp_path, rng):
    words = [*rng.permutation(ODD_WORDS), "", *rng.choice([*ODD_WORDS, ""], 40)]
    store = build(tmp_path, words, kind, rng)
    assert store.column("y").to_pylist() == [word or None for word in words]
    objective = Supervised([Target(name="y")])
    objective.bind(RunData(TOKENIZER, {"train": Part(store, np.arange(len(store)))}))
    assert readouts_of(objective.heads)[0].classes == tuple(sorted(ODD_WORDS))
    counts = Counter(filter(None, words))
    [remark] = objective.remarks
    assert f"{len(words) - words.count('')} with a label, {words.count('')} without" in remark
    for name in sorted(ODD_WORDS)[:5]:
        assert f"{name} {counts[name]}" in remark
    for record, word in zip(store.records(np.arange(len(store))), words):
        (tokens,) = objective.prepare(record, ready(TOKENIZER.encode(record.payload)), rng)
        assert int(tokens.labels["y"]) == (sorted(ODD_WORDS).index(word) if word else IGNORE)


@pytest.mark.parametrize("merged", [lambda word: word.lstrip("0") or "0", lambda word: word.lower()])
def test_merging_words_would_be_seen(merged, tmp_path, rng, monkeypatch):
    """The mutants: numbers without their zeros, and booleans of every case as one."""
    real = labels_module.as_text
    monkeypatch.setattr(
        "meristem.data.reading.tables.as_text",
        lambda column: pa.array([None if word is None else merged(word) for word in real(column).to_pylist()]),
    )
    with pytest.raises(AssertionError):
        test_every_word_is_a_class_of_its_own_and_only_an_empty_cell_is_missing("csv", tmp_path, rng)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([0, -7, 2**63 - 1, None]), ["0", "-7", "9223372036854775807", None]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([0.1, 1.0, 1e300, 123456789.125]), ["0.1", "1", "1e+300", "123456789.125"]),
        (pa.array([0.1, None], pa.float32()), ["0.1", None]),
        (pa.array([decimal.Decimal("1.10")]), ["1.10"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([datetime.date(2020, 1, 2)]), ["2020-01-02"]),
        (pa.array(["a", "", None]), ["a", None, None]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
        (pa.array([[1, 2], None, []]), [["1", "2"], None, []]),
        (pa.array([["01", None], ["1"]], pa.large_list(pa.string())), [["01", None], ["1"]]),
        (pa.array([[1.5, 2.0]], pa.list_(pa.float32(), 2)), [["1.5", "2"]]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_columns_of_every_type_become_text_with_every_digit(column, expected):
    assert as_text(column).to_pylist() == expected
    rows = list(range(len(expected)))[::-1]
    assert as_text(column.take(pa.array(rows))).to_pylist() == [expected[row] for row in rows]
    assert as_text(column.slice(1)).to_pylist() == expected[1:]


def test_doubles_come_back_from_their_text(rng):
    values = rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)
    assert [number_of(word) for word in as_text(pa.array(values)).to_pylist()] == values.tolist()


@pytest.mark.parametrize("column", [pa.array([{"a": 1}]), pa.array([[[1]]]), pa.array([b"\xff"])])
def test_what_cannot_be_a_label_is_refused(column, tmp_path):
    with pytest.raises(DataError, match="labels must be words, numbers"):
        as_text(column)
    pq.write_table(pa.table({"sequence": ["MKV"], "y": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet:?.*'y'"):
        list(protein.reader.read(Source(str(tmp_path / "x.parquet")), ReadOptions(label_columns=("y",))))


def test_labels_of_python_become_text():
    assert text_column(["01", 1, 1.5, True, None, np.int64(3)]).to_pylist() == ["01", "1", "1.5", "true", None, "3"]
    assert text_column([[1, "b"], None, ("c",)]).to_pylist() == [["1", "b"], None, ["c"]]
    assert text_column([None, None]).to_pylist() == [None, None]
    for wrong in ([{"a": 1}], [["a"], "b"], [[["a"]]]):
        with pytest.raises(DataError, match="labels must be"):
            text_column(wrong)


@pytest.mark.parametrize(
    ("word", "number"),
    [("1", 1.0), ("-1.50", -1.5), ("1e5", 1e5), (".5", 0.5), ("2.", 2.0), (" 3 ", 3.0), ("+7E-2", 0.07)],
)
def test_numbers_are_decimal_and_finite(word, number):
    assert number_of(word) == number


@pytest.mark.parametrize(
    "word", ["", "nan", "inf", "-Infinity", "1_000", "0x10", "1,5", "NA", "true", "1e999", "\u0661"]
)
def test_other_words_are_no_numbers(word):
    assert number_of(word) is None


def test_classes_are_ordered_by_number_where_all_are_numbers():
    assert sort_classes(["10", "9", "01", "1", "-2"]) == ("-2", "01", "1", "9", "10")
    assert sort_classes(["10", "9", "1.5"]) == ("1.5", "10", "9")
    assert sort_classes(map(str, range(10))) == tuple("0123456789")


def random_token_labels(rng: np.random.Generator, payloads: list[str], as_lists: bool) -> list:
    found = []
    for payload in payloads:
        words = rng.choice(list("01-"), len(payload))
        found.append(None if rng.random() < 0.2 else list(map(str, words)) if as_lists else "".join(words))
    return found


@pytest.mark.parametrize("as_lists", [False, True])
def test_labels_of_tokens_are_digits_or_lists_and_declared_words_are_missing(as_lists, rng):
    payloads = random_payloads(rng, 30)
    labels = random_token_labels(rng, payloads, as_lists)
    records = [
        Record.of(str(i), payload, {} if label is None else {"y": label}, f"x.csv:{i}")
        for i, (payload, label) in enumerate(zip(payloads, labels))
    ]
    objective = Supervised([Target(name="y", level="token")])
    objective.bind(RunData(TOKENIZER, {"train": Part.of(records)}, missing_labels=("-",)))
    assert readouts_of(objective.heads)[0].classes == ("0", "1")
    # a label that is a declared word as a whole is missing, and none of its tokens is counted
    flat = Counter(word for label in labels if label and label != "-" for word in label)
    assert f"{flat['-']} tokens of them without" in objective.remarks[0]
    assert f"(0 {flat['0']}, 1 {flat['1']})" in objective.remarks[0]
    for record, label in zip(records, labels):
        (tokens,) = objective.prepare(record, ready(TOKENIZER.encode(record.payload)), rng)
        inner = [IGNORE if word == "-" else int(word) for word in label or "-" * len(record.payload)]
        assert tokens.targets["y"].tolist() == [IGNORE, *inner, IGNORE]


def test_a_declared_word_that_is_the_whole_label_of_tokens_is_a_missing_label():
    column = LabelColumn("y", is_per_token=True, missing=("NA", "-"))
    assert column.entries("NA", 7) == []
    assert column.entries("AN-", 3) == ["A", "N", None]
    assert column.entries(["NA", "", None, "b"], 4) == [None, None, None, "b"]


def test_counts_are_those_of_a_slow_count(rng):
    labels = [str(word) or None for word in rng.choice(["a", "b", "NA", ""], 200)]
    records = [Record.of(str(i), "M", {"y": label} if label else {}) for i, label in enumerate(labels)]
    objective = Supervised([Target(name="y")])
    objective.bind(RunData(TOKENIZER, {"train": Part.of(records)}, missing_labels=("NA",)))
    known = Counter(label for label in labels if label in ("a", "b"))
    counted = f"{known.total()} with a label, {200 - known.total()} without (a {known['a']}, b {known['b']})"
    assert objective.remarks == (f"label y: train {counted}",)
