"""A student learns what its teacher says of the very packs that it sees."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from random_proteins import random_proteins

from labelled import ready, run_data
from meristem.data.pack import pack
from meristem.domain import load_domain
from meristem.errors import ConfigError
from meristem.model.config import Attention, Embedding, FeedForward, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.model_directory import ModelCard, save_model
from meristem.objectives.supervised import Target
from meristem.train.distilled import Distilled
from meristem.types import PackedBatch, Record
from model_runs import outputs_of, specs

TOKENIZER = load_domain("protein").tokenizer()
CONFIG = TransformerConfig(
    width=16,
    num_layers=1,
    embedding=Embedding(vocab_size=len(TOKENIZER.vocab)),
    attention=Attention(num_heads=2),
    feedforward=FeedForward(width=32),
)


def _readout(classes: str = "abc", name: str = "place") -> Readout:
    return Readout(name=name, level="record", task="classification", classes=tuple(classes))


def _teacher(path: Path, readout: Readout | None = None) -> Model:
    readout = readout or _readout()
    model = Model(CONFIG, specs((), (readout,)))
    with torch.no_grad():  # sharp answers
        model.heads[readout.name].out.weight *= 50
    save_model(path, ModelCard(CONFIG, TOKENIZER, specs((), (readout,)), domain="protein"), model)
    return model.eval()


def _bound(path: Path, **options) -> Distilled:
    objective = Distilled([Target(name="place")], str(path), **options)
    objective.bind(run_data(TOKENIZER, place=["a", "b", "c"]))
    return objective


def _batch(rng: np.random.Generator, objective: Distilled, labels: list) -> PackedBatch:
    tokens = []
    for i, (sequence, label) in enumerate(zip(random_proteins(rng, len(labels)), labels)):
        record = Record.of(str(i), sequence, {} if label is None else {"place": label}, f"x:{i}")
        tokens += objective.prepare(record, ready(TOKENIZER.encode(sequence)), rng)
    return pack(tokens, range(len(labels)))


@torch.no_grad()
def _by_hand(student: Model, teacher: Model, batch: PackedBatch, temperature: float, is_hard: bool) -> float:
    total = 0.0
    own, given = (outputs_of(one, batch, "place").double() for one in (student, teacher))
    for q, p in zip((own / temperature).softmax(-1), (given / temperature).softmax(-1)):
        if is_hard:
            total -= float(q[p.argmax()].log())
        else:
            total += temperature**2 * float((p * (p.log() - q.log())).sum())
    return total


@pytest.mark.parametrize(("temperature", "is_hard"), [(1.0, False), (3.0, False), (1.0, True)])
def test_loss_of_the_teacher_is_that_of_its_answers(rng, tmp_path, temperature, is_hard):
    teacher = _teacher(tmp_path / "teacher")
    objective = _bound(tmp_path / "teacher", temperature=temperature, is_hard=is_hard, teacher_weight=0.3)
    batch = _batch(rng, objective, ["a", "b", None, "c"])
    student = Model(CONFIG, objective.heads).train()
    out = objective.loss_of(student, objective.build(CONFIG), batch)
    term = out.terms["place_teacher"]
    wanted = _by_hand(student, teacher, batch, temperature, is_hard)
    # fp32 against doubles
    assert float(term.sum.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert term.weight == 0.3
    assert {name: float(term.count) for name, term in out.terms.items()} == objective.counts(batch)
    assert objective.counts(batch) == {"place": 3, "place_teacher": 4}
    # the mutant: another teacher's answers; some teachers say the same of four pictures
    others = [Model(CONFIG, objective.heads).eval() for _ in range(12)]
    answers = [_by_hand(student, other, batch, temperature, is_hard) for other in others]
    assert any(answer != pytest.approx(wanted, rel=1e-3) for answer in answers)


def test_evaluation_asks_no_teacher_and_it_learns_nothing(rng, tmp_path):
    _teacher(tmp_path / "teacher")
    objective = _bound(tmp_path / "teacher")
    batch = _batch(rng, objective, ["a", "b"])
    student = Model(CONFIG, objective.heads)
    assert list(objective.loss_of(student.eval(), objective.build(CONFIG), batch).terms) == ["place"]
    terms = objective.loss_of(student.train(), objective.build(CONFIG), batch).terms
    sum(term.sum for term in terms.values()).backward()
    assert not any(p.requires_grad or p.grad is not None for p in objective._teacher.parameters())
    assert not list(objective.build(CONFIG).parameters())


def test_workers_get_no_teacher(tmp_path):
    _teacher(tmp_path / "teacher")
    objective = _bound(tmp_path / "teacher")
    assert objective._teacher is not None
    assert pickle.loads(pickle.dumps(objective))._teacher is None


@pytest.mark.parametrize("readout", [_readout("abd"), _readout(name="other")])
def test_a_teacher_of_other_classes_is_refused(tmp_path, readout):
    _teacher(tmp_path / "teacher", readout)
    with pytest.raises(ConfigError, match="teacher must predict 'place' with the classes a, b, c"):
        _bound(tmp_path / "teacher")


def test_a_run_with_a_teacher_is_trained_validated_and_gone_on_with(bench, rng):
    proteins = random_proteins(rng, 60)
    rows = "".join(f"{sequence},{'abc'[len(sequence) % 3]}\n" for sequence in proteins)
    (bench.path / "labels.csv").write_text("sequence,place\n" + rows)
    bench.replace(
        "objective: {class_path: MaskedTokens}",
        "objective: {class_path: Supervised, init_args: {targets: [{name: place}]}}",
    )
    bench.replace("proteins.fasta", "labels.csv")
    bench.replace("max_steps: 40", "max_steps: 7")
    done = bench.run("--run_dir", "teacher")
    assert done.code == 0, done.err
    bench.replace("class_path: Supervised, init_args: {", "class_path: Distilled, init_args: {teacher: teacher, ")
    done = bench.run("--run_dir", "student")
    assert done.code == 0, done.err
    losses = [row["loss/place_teacher"] for row in bench.rows("student")]
    assert len(losses) == 7
    assert all(float(loss) > 0 for loss in losses)
    done = bench.run("--run_dir", "student", verb="validate")
    assert done.code == 0, done.err
    assert (bench.path / "student" / "confusion_place_validation.png").stat().st_size > 1000
