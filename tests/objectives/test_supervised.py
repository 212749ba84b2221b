"""Labels: what is learned from them, what is missing, and what is refused."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from labelled import ready, records_of, run_data
from meristem.data.corrupt import crop_window
from meristem.data.pack import pack
from meristem.data.parts import Part, RunData
from meristem.domain import load_domain
from meristem.errors import ConfigError, DataError
from meristem.model.config import Attention, Embedding, FeedForward, TransformerConfig
from meristem.model.heads import readouts_of
from meristem.model.model import Model
from meristem.model.transformer import Encoder
from meristem.objectives import targets
from meristem.objectives.supervised import Supervised, Target
from meristem.types import IGNORE, Record
from model_runs import outputs_of

TOKENIZER = load_domain("protein").tokenizer()
CONFIG = TransformerConfig(
    width=32,
    num_layers=1,
    embedding=Embedding(vocab_size=33),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
)


def _bound(targets: list[Target], payloads: list[str] | None = None, **columns) -> Supervised:
    objective = Supervised(targets)
    objective.bind(run_data(TOKENIZER, payloads, **columns))
    return objective


def _prepare(objective, sequence: str, **labels):
    record = Record.of("p1", sequence, labels, "file.csv:7")
    return objective.prepare(record, ready(TOKENIZER.encode(sequence)), np.random.default_rng(0))[0]


def test_missing_labels_count_for_nothing(rng):
    objective = _bound(
        [Target(name="place"), Target(name="score", task="regression"), Target(name="ss", level="token")],
        place=["b", "a", None, ""],
        score=["1.0", "3", None, ""],
        ss=["HC", None],
        payloads=["MK", "M", "M", "M"],
    )
    tokens = [
        _prepare(objective, "MKV", place="a", score="2.0", ss="HHC"),
        _prepare(objective, "MK", place="", score="", ss=""),
        _prepare(objective, "MKVA"),
    ]
    batch = pack(tokens, range(3))
    model = Model(CONFIG, objective.heads)
    out = objective.loss_of(model, objective.build(CONFIG), batch)
    assert {name: float(term.count) for name, term in out.terms.items()} == {"place": 1, "score": 1, "ss": 3}
    assert objective.counts(batch) == {"place": 1, "score": 1, "ss": 3}
    nothing = pack(tokens[2:], range(1))
    out = objective.loss_of(model, objective.build(CONFIG), nothing)
    assert all(term.count == 0 and term.sum == 0 for term in out.terms.values())


def test_class_weights_are_those_of_torch(rng):
    weights = [0.5, 2.0, 7.0]
    objective = _bound([Target(name="place", class_weights=weights)], place=["c", "a", "b"])
    tokens = [_prepare(objective, "MKVAG"[: 2 + i], place="abc"[i % 3]) for i in range(4)]
    batch = pack(tokens, range(4))
    model = Model(CONFIG, objective.heads).eval()
    term = objective.loss_of(model, objective.build(CONFIG), batch).terms["place"]
    logits = outputs_of(model, batch, "place")
    expected = F.cross_entropy(logits, batch.labels["place"], torch.tensor(weights))
    torch.testing.assert_close(term.sum / term.count, expected)


def test_balanced_weights_give_each_class_the_same_share():
    objective = _bound([Target(name="place", class_weights="balanced")], place=["a"] * 6 + ["b"] * 3 + ["c"])
    weights = objective._bound["place"].class_weights
    assert [6 * weights[0], 3 * weights[1], weights[2]] == pytest.approx([10 / 3] * 3)


def test_values_are_standardised_and_reported_in_their_own_unit(rng):
    values = list(rng.normal(50, 9, 40))
    objective = _bound([Target(name="score", task="regression")], score=[repr(float(value)) for value in values])
    readout = readouts_of(objective.heads)[0]
    assert readout.mean[0] == pytest.approx(np.mean(values))
    assert readout.std[0] == pytest.approx(np.std(values))
    tokens = [_prepare(objective, "MKVA", score=repr(float(value))) for value in values[:5]]
    batch = pack(tokens, range(5))
    np.testing.assert_allclose(batch.labels["score"], (np.array(values[:5]) - readout.mean) / readout.std, rtol=1e-5)
    out = objective.loss_of(Model(CONFIG, objective.heads), objective.build(CONFIG), batch)
    np.testing.assert_allclose(out.targets["score"], values[:5], rtol=1e-5)
    assert set(objective.metrics()) == {"score/spearman", "score/mae", "score/r2"}


def test_token_labels_follow_the_window_that_a_record_is_cropped_to(rng):
    sequence = "LAGVSERTIDPKQNFYMHWC"
    objective = _bound([Target(name="ss", level="token")], [sequence], ss=["ABCDEFGHIJKLMNOPQRST"])
    labels = "ABCDEFGHIJKLMNOPQRST"
    for seed in range(20):
        window = crop_window(TOKENIZER.encode(sequence), 9, np.random.default_rng(seed))
        record = Record.of("p", sequence, {"ss": labels}, "file.csv:1")
        (tokens,) = objective.prepare(record, ready(window), rng)
        residues = TOKENIZER.decode(tokens)
        expected = [ord(labels[sequence.index(residue)]) - ord("A") for residue in residues]
        assert tokens.targets["ss"].tolist() == [IGNORE, *expected, IGNORE]


@pytest.mark.parametrize(
    ("target", "columns", "labels", "said"),
    [
        ({"name": "y"}, {"y": ["a", "a"]}, None, r"file.csv:2: .*'y'.*two classes"),
        ({"name": "y", "task": "regression"}, {"y": ["1", "high"]}, None, r"file.csv:3: .*'y'.*number; got 'high'"),
        ({"name": "y", "task": "regression"}, {"y": ["2.0", "2"]}, None, r"file.csv:2: .*'y'.*different"),
        ({"name": "y"}, {"y": ["a", "b"]}, {"y": "z"}, r"file.csv:7: .*'y'.*\(a, b\); got 'z'"),
        ({"name": "y"}, {"y": ["a", "b", ["a", "b"]]}, None, "all words or all lists"),
        ({"name": "y"}, {"y": [["a"], ["b"]]}, None, r"file.csv:2: .*'y'.*one word a record; got a list of 1"),
        ({"name": "y", "level": "token"}, {"y": ["a", "ab"]}, None, r"file.csv:3: .*'y'.*1 symbols; got 2"),
        ({"name": "y", "level": "token"}, {"y": ["a", "b"]}, {"y": "abab"}, r"file.csv:7: .*'y'.*3 symbols; got 4"),
        ({"name": "y", "level": "token"}, {"y": ["a", "b"]}, {"y": "4"}, r"file.csv:7: .*'y'.*got 1"),
    ],
)
def test_a_wrong_label_is_named_by_file_and_line(target, columns, labels, said):
    with pytest.raises(DataError, match=said):  # noqa: PT012 (binding or preparing)
        objective = _bound([Target(**target)], **columns)
        _prepare(objective, "MKV", **labels)


def _bind_parts(target: dict, missing: tuple[str, ...] = (), payloads: list[str] | None = None, **parts) -> Supervised:
    objective = Supervised([Target(name="y", **target)])
    lines = dict(zip(parts, (2, 102, 202)))
    data = {name: Part.of(records_of(payloads, start=lines[name], y=labels)) for name, labels in parts.items()}
    objective.bind(RunData(TOKENIZER, data, missing_labels=missing))
    return objective


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize(
    ("target", "labels", "wrong", "said"),
    [
        (
            {},
            ["a", "b"],
            ["a", "z", "z", "y"],
            r"file.csv:\d03: label 'y' .*\(a, b\); the {} part has others: y 1, z 2 .*",
        ),
        ({}, ["1", "2"], ["1", "01"], r"file.csv:\d03: .*\(1, 2\); the {} part has others: 01 1 "),
        (
            {"task": "regression"},
            ["1", "2"],
            ["1", "NA"],
            r"file.csv:\d03: .*number; got 'NA' .*missing_labels: \[NA\]",
        ),
        ({"task": "regression"}, ["1", "2"], ["1", "inf"], r"file.csv:\d03: .*finite number; got 'inf'"),
        ({"level": "token"}, ["ab", "bb"], ["ab", "abc"], r"file.csv:\d03: .*2 symbols; got 3"),
        ({"level": "token"}, ["ab", "bb"], ["ab", "ac"], r"file.csv:\d03: .*\(a, b\); the {} part has others: c 1 "),
        ({"level": "token", "task": "regression"}, ["12", "34"], ["56", "7x"], r"file.csv:\d03: .*number; got 'x'"),
    ],
)
def test_labels_of_every_part_are_checked_before_the_first_step(part, target, labels, wrong, said):
    payloads = ["MK"] * 4
    _bind_parts(target, payloads=payloads, train=labels, validation=labels[:1], test=labels[:1])
    with pytest.raises(DataError, match=said.format(part)):
        _bind_parts(target, payloads=payloads, **{"train": labels, "validation": labels[:1], part: wrong})


@pytest.mark.parametrize("skipped", ["_refuse_unknown", "_numbers"])
def test_a_part_that_is_not_checked_would_be_seen(skipped, monkeypatch):
    """The mutants: only the training records are looked at."""
    real = getattr(targets, skipped)
    is_first = [True]

    def first_only(*arguments):
        if is_first[0]:
            is_first[0] = False
            return real(*arguments)
        return np.zeros(1)

    monkeypatch.setattr(targets, skipped, first_only)
    target = {} if skipped == "_refuse_unknown" else {"task": "regression"}
    _bind_parts(target, train=["1", "2"], validation=["1", "x"])


def _skipping(targets: list[Target], **parts: list[dict]) -> tuple[Supervised, RunData, list[str]]:
    """An objective bound to parts of records with these labels, which leaves out what it cannot use."""
    refused: list[str] = []
    data = RunData(
        TOKENIZER,
        {
            name: Part.of([Record.of(f"{name}{i}", "MK", row, f"{name}.csv:{i}") for i, row in enumerate(rows)])
            for name, rows in parts.items()
        },
        on_error=lambda refusal: refused.append(str(refusal)),
    )
    objective = Supervised(targets)
    objective.bind(data)
    return objective, data, refused


@pytest.mark.parametrize("mutant", ["", "not taken out", "learned once"])
def test_records_with_bad_labels_are_left_out_and_named_where_that_is_asked_for(mutant, monkeypatch):
    """One bad label takes out the record, whose other labels then teach nothing: neither classes nor scales."""
    rows = [{"place": "ab"[i % 2], "score": str(i), "ss": "HC"} for i in range(6)]
    train = [*rows, {"place": "only here", "score": "high"}, {"place": "a", "score": "1000", "ss": "HCH"}]
    validation = [rows[0], {"place": "only here"}, {"place": "b", "score": "1,5"}, rows[1]]
    if mutant == "not taken out":
        monkeypatch.setattr(RunData, "leave_out", lambda data: False)
    if mutant == "learned once":
        real = RunData.leave_out
        monkeypatch.setattr(RunData, "leave_out", lambda data: real(data) and False)
    targets = [Target(name="place"), Target(name="score", task="regression"), Target(name="ss", level="token")]
    objective, data, refused = _skipping(targets, train=train, validation=validation)
    place, score, _ = readouts_of(objective.heads)
    ids = {name: [record.id for record in part.store.records(part.rows)] for name, part in data.parts.items()}
    is_right = (
        place.classes == ("a", "b")
        and score.mean == (2.5,)
        and ids == {"train": [f"train{i}" for i in range(6)], "validation": ["validation0", "validation3"]}
        and [one.partition(" must")[0] for one in refused]
        == [
            "train.csv:6: label 'score'",
            "train.csv:7: label 'ss'",
            "validation.csv:2: label 'score'",
            "validation.csv:1: label 'place'",
        ]
    )
    assert is_right == (not mutant)


def test_a_part_of_which_no_record_is_left_is_an_error():
    said = r"validation\.csv:0: no record of the validation part is left; all were refused: label 'y' must be a finite"
    with pytest.raises(DataError, match=said):
        _skipping([Target(name="y", task="regression")], train=[{"y": "1"}, {"y": "2"}], validation=[{"y": "x"}])


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_without_labels_is_an_error_and_no_loss_that_is_no_number(part, task):
    parts = {"train": ["1", "2", "1"], "validation": ["1"], "test": ["2"], part: [None, "", "NA"]}
    with pytest.raises(DataError, match=rf"file.csv:\d02: the {part} part must have a record with a label 'y'; none"):
        _bind_parts({"task": task}, missing=("NA",), **parts)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labels_are_counted_in_every_part_and_declared_words_are_missing(task):
    parts = {"train": ["1", "2", "NA", None, "2"], "validation": ["1", "NA"], "test": ["2", "?", ""]}
    objective = _bind_parts({"task": task}, missing=("NA", "?"), **parts)
    [remark] = objective.remarks
    shown = {"classification": ("1 1, 2 2", "1 1", "2 1"), "regression": ("1 to 2", "1 to 1", "2 to 2")}[task]
    assert remark == (
        f"label y: train 3 with a label, 2 without ({shown[0]}); validation 1 with a label, 1 without ({shown[1]}); "
        f"test 1 with a label, 2 without ({shown[2]})"
    )
    (tokens,) = objective.prepare(
        Record.of("a", "M", {"y": "NA"}, ""), ready(TOKENIZER.encode("M")), np.random.default_rng(0)
    )
    assert np.isnan(tokens.labels["y"]) if task == "regression" else tokens.labels["y"] == IGNORE


def test_many_classes_are_counted_and_some_are_named():
    objective = _bind_parts({}, train=list(map(str, range(300))))
    assert readouts_of(objective.heads)[0].classes == tuple(map(str, range(300)))
    assert "11 1, and 288 more" in objective.remarks[0]
    with pytest.raises(DataError, match=r"\(0, 1, .*, 11, and 288 more\); the test part has others: x 1 "):
        _bind_parts({}, train=list(map(str, range(300))), test=["x"])


@pytest.mark.parametrize(
    "target",
    [
        {"name": "tokens"},
        {"name": "a.b"},
        {"name": "y", "weight": 0},
        {"name": "y", "task": "regression", "class_weights": "balanced"},
    ],
)
def test_impossible_targets_are_refused(target):
    with pytest.raises(ConfigError, match="target"):
        Target(**target)


def test_a_loss_that_reads_class_rows_alone_is_that_of_a_whole_pass(rng, monkeypatch):
    objective = _bound([Target(name="place", pool="cls")], place=["a", "b"])
    batch = pack([_prepare(objective, "MKVAG" * (1 + i % 3), place="ab"[i % 2]) for i in range(5)], range(5))
    model = Model(CONFIG, objective.heads)
    losses, grads, rows = [], [], []
    model.trunk.final_norm.register_forward_hook(lambda _, __, made: rows.append(len(made)))
    for may_leave_rows in (True, False):
        monkeypatch.setattr(Encoder, "may_leave_rows", may_leave_rows)
        model.zero_grad()
        term = objective.loss_of(model, objective.build(CONFIG), batch).terms["place"]
        term.sum.backward()
        losses.append(term.sum)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert rows == [16, batch.layout.num_rows]
