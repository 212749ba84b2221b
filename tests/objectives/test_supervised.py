"""Labels: what is learned from them, what is missing, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meristem.data.corrupt import crop_window
from meristem.data.pack import pack
from meristem.domain import load_domain
from meristem.errors import ConfigError, DataError
from meristem.model.config import Attention, Embedding, FeedForward, TransformerConfig
from meristem.model.model import Model
from meristem.model.transformer import Encoder
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


def _bound(targets: list[Target], **columns) -> Supervised:
    objective = Supervised(targets)
    objective.bind(TOKENIZER, columns, lambda row: f"file.csv:{row + 2}")
    return objective


def _prepare(objective, sequence: str, **labels):
    record = Record("p1", sequence, labels, "file.csv:7")
    return objective.prepare(record, (TOKENIZER.encode(sequence),), np.random.default_rng(0))[0]


def test_missing_labels_count_for_nothing(rng):
    objective = _bound(
        [Target(name="place"), Target(name="score", task="regression"), Target(name="ss", level="token")],
        place=["b", "a", None, ""],
        score=[1.0, 3.0, None, math.nan],
        ss=["HC", None],
    )
    tokens = [
        _prepare(objective, "MKV", place="a", score=2.0, ss="HHC"),
        _prepare(objective, "MK", place="", score=math.nan, ss=""),
        _prepare(objective, "MKVA"),
    ]
    batch = pack(tokens, range(3))
    model = Model(CONFIG, (), objective.readouts)
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
    model = Model(CONFIG, (), objective.readouts).eval()
    term = objective.loss_of(model, objective.build(CONFIG), batch).terms["place"]
    logits = outputs_of(model, batch, "place", TOKENIZER.num_special)
    expected = F.cross_entropy(logits, batch.labels["place"], torch.tensor(weights))
    torch.testing.assert_close(term.sum / term.count, expected)


def test_balanced_weights_give_each_class_the_same_share():
    objective = _bound([Target(name="place", class_weights="balanced")], place=["a"] * 6 + ["b"] * 3 + ["c"])
    weights = objective._bound["place"].class_weights
    assert [6 * weights[0], 3 * weights[1], weights[2]] == pytest.approx([10 / 3] * 3)


def test_values_are_standardised_and_reported_in_their_own_unit(rng):
    values = list(rng.normal(50, 9, 40))
    objective = _bound([Target(name="score", task="regression")], score=values)
    readout = objective.readouts[0]
    assert readout.mean[0] == pytest.approx(np.mean(values))
    assert readout.std[0] == pytest.approx(np.std(values))
    tokens = [_prepare(objective, "MKVA", score=value) for value in values[:5]]
    batch = pack(tokens, range(5))
    np.testing.assert_allclose(batch.labels["score"], (np.array(values[:5]) - readout.mean) / readout.std, rtol=1e-5)
    out = objective.loss_of(Model(CONFIG, (), objective.readouts), objective.build(CONFIG), batch)
    np.testing.assert_allclose(out.targets["score"], values[:5], rtol=1e-5)
    assert set(objective.metrics()) == {"score/spearman", "score/mae", "score/r2"}


def test_token_labels_follow_the_window_that_a_record_is_cropped_to(rng):
    objective = _bound([Target(name="ss", level="token")], ss=["ABCDEFGHIJKLMNOPQRST"])
    sequence = "LAGVSERTIDPKQNFYMHWC"
    labels = "ABCDEFGHIJKLMNOPQRST"
    for seed in range(20):
        window = crop_window(TOKENIZER.encode(sequence), 9, TOKENIZER.num_special, np.random.default_rng(seed))
        record = Record("p", sequence, {"ss": labels}, "file.csv:1")
        (tokens,) = objective.prepare(record, (window,), rng)
        residues = TOKENIZER.decode(tokens)
        expected = [ord(labels[sequence.index(residue)]) - ord("A") for residue in residues]
        assert tokens.targets["ss"].tolist() == [IGNORE, *expected, IGNORE]


@pytest.mark.parametrize(
    ("target", "columns", "labels", "said"),
    [
        ({"name": "y"}, {"y": ["a", "a"]}, None, r"file.csv:2: .*'y'.*two classes"),
        ({"name": "y", "task": "regression"}, {"y": ["1", "high"]}, None, r"file.csv:3: .*'y'.*number; got 'high'"),
        ({"name": "y", "task": "regression"}, {"y": [2.0, 2.0]}, None, r"file.csv:2: .*'y'.*different"),
        ({"name": "y"}, {"y": ["a", "b"]}, {"y": "z"}, r"file.csv:7: .*'y'.*\(a, b\); got 'z'"),
        ({"name": "y", "level": "token"}, {"y": ["ab"]}, {"y": "abab"}, r"file.csv:7: .*'p1'.*3 symbols; got 4"),
        ({"name": "y", "level": "token"}, {"y": ["ab"]}, {"y": 4}, r"file.csv:7: .*'p1'.*got 4"),
    ],
)
def test_a_wrong_label_is_named_by_file_and_line(target, columns, labels, said):
    with pytest.raises(DataError, match=said):  # noqa: PT012 (binding or preparing)
        objective = _bound([Target(**target)], **columns)
        _prepare(objective, "MKV", **labels)


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
    model = Model(CONFIG, (), objective.readouts)
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
