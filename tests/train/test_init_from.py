"""A run that starts from a model takes all of it over, and what is set for the run goes over what the model says."""

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_proteins import random_proteins

import meristem
from meristem.domain import load_domain
from meristem.model.config import (
    Attention,
    AttentionPool,
    Embedding,
    FeedForward,
    Mean,
    Pool,
    Prefix,
    Residual,
    TransformerConfig,
)
from meristem.model.model import Model
from meristem.model_directory import ModelCard, load_model, save_model
from meristem.train.task import Task

TOKENIZER = load_domain("protein").tokenizer()
POOLS: dict[str, Pool] = {
    "attention": AttentionPool(num_heads=2, feedforward_width=24),
    "a norm behind the mean": Mean(is_normed=True),
    "a map": Prefix(is_dense=True),
}
CONFIG = """
model:
  objective: {class_path: Supervised, init_args: {targets: [{name: kind, pool: own}]}}
  optimizer: {lr: 1e-3, warmup_steps: 2}
data: {domain: protein, sources: kinds.csv, tokens_per_batch: 400, split: {validation_frac: 0.2}}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, logger: false}
watch: {validate_every_n_steps: 2, save_every_n_steps: 2}
"""


def given_model(folder: Path, pool: Pool | None, residual: Residual = Residual()) -> Model:  # noqa: B008 (frozen)
    """A model directory, every parameter redrawn."""
    config = TransformerConfig(
        width=16,
        num_layers=2,
        embedding=Embedding(vocab_size=len(TOKENIZER.vocab)),
        attention=Attention(num_heads=2),
        feedforward=FeedForward(width=32),
        residual=residual,
        pool=pool,
    )
    card = ModelCard(config, TOKENIZER, domain="protein")
    model = card.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(folder, card, model)
    return model


@pytest.fixture
def kinds(bench, rng: np.random.Generator) -> Iterator[Path]:
    """A table of two kinds of proteins, and the config that tells them apart."""
    rows = [{"sequence": p, "kind": "ab"[i % 2]} for i, p in enumerate(random_proteins(rng, 60))]
    with (bench.path / "kinds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sequence", "kind"])
        writer.writeheader()
        writer.writerows(rows)
    bench.config.write_text(CONFIG)
    return bench.path


@pytest.mark.parametrize(("name", "is_mutant"), [*((name, False) for name in POOLS), ("attention", True)])
def test_the_pool_of_a_model_is_taken_over(kinds: Path, bench, monkeypatch, name: str, is_mutant: bool) -> None:
    """Before a step is taken, vectors are those of the model that the run starts from; the mutant forgets its pool."""
    given = given_model(kinds / "given", POOLS[name])
    sequences = ["MKTAYIAKQR", "GSHMLEDPV", "WWQ"]
    wanted = meristem.load(kinds / "given", device="cpu").embed(sequences)
    build = Task._load_initial
    seen: list[np.ndarray] = []

    def load(self: Task, path: str) -> None:
        assert self.model.pool is not None
        fresh = {key: value.clone() for key, value in self.model.pool.state_dict().items()}
        build(self, path)
        if is_mutant:
            self.model.pool.load_state_dict(fresh)
        card = ModelCard(self.architecture, TOKENIZER, domain="protein")
        bare = Model(self.architecture)
        bare.load_state_dict({key: value for key, value in self.model.state_dict().items() if "heads." not in key})
        save_model(kinds / "start", card, bare)
        seen.append(meristem.load(kinds / "start", device="cpu").embed(sequences))

    monkeypatch.setattr(Task, "_load_initial", load)
    done = bench.run("--model.init_from", "given", "--run_dir", "run")
    assert done.code == 0, done.err
    assert np.array_equal(seen[0], wanted) != is_mutant
    if not is_mutant:
        # a label that reads through it trains it
        _, trained = load_model(kinds / "run" / "model-last")
        for key, value in given.pool.state_dict().items():
            assert not torch.equal(trained.pool.state_dict()[key], value), key
        assert [readout.pool for readout in trained.readouts] == [None]


def test_a_pool_that_no_label_reads_stays_as_it_was(kinds: Path, bench) -> None:
    """So `meristem embed` of the trained model, which pools as the model does, has no random weights in it."""
    given = given_model(kinds / "given", POOLS["attention"])
    bench.replace("pool: own", "pool: mean")
    assert bench.run("--model.init_from", "given", "--run_dir", "run").code == 0
    _, trained = load_model(kinds / "run" / "model-last")
    for key, value in given.pool.state_dict().items():
        assert torch.equal(trained.pool.state_dict()[key], value), key


def test_a_label_that_asks_for_a_pool_that_is_not_there_is_refused(kinds: Path, bench) -> None:
    given_model(kinds / "given", None)
    done = bench.run("--model.init_from", "given", "--run_dir", "run")
    assert done.code == 2
    assert re.fullmatch(r"meristem: error: [^\n]*label 'kind' takes the model's own pool[^\n]*none[^\n]*\n", done.err)
    assert not (kinds / "run").exists()


def residuals(monkeypatch: pytest.MonkeyPatch) -> list[Residual]:
    """Of each task that is made."""
    seen: list[Residual] = []
    build = Task.configure_model

    def look(self: Task) -> None:
        seen.append(self.architecture.residual)
        build(self)

    monkeypatch.setattr(Task, "configure_model", look)
    return seen


@pytest.mark.parametrize("is_set", [False, True])
def test_branches_are_left_out_as_the_run_says_or_else_the_model(kinds: Path, bench, monkeypatch, is_set: bool) -> None:
    own = Residual(dropout=0.05, drop_path=0.15)
    given_model(kinds / "given", POOLS["a map"], own)
    seen = residuals(monkeypatch)
    asked = ["--model.drop_path", "0.4", "--model.dropout", "0.2"] if is_set else []
    assert bench.run("--model.init_from", "given", "--run_dir", "run", *asked).code == 0
    wanted = replace(own, dropout=0.2, drop_path=0.4) if is_set else own
    assert set(seen) == {wanted}
    card, _ = load_model(kinds / "run" / "model-last")
    assert card.architecture.residual == wanted
    # what is measured afterwards is the model that was left, whatever the config says of training
    assert bench.run("--run_dir", "run", "--model.init_from", "given", *asked, verb="validate").code == 0
    assert set(seen) == {wanted}


def test_leaving_branches_out_changes_the_training_and_another_share_changes_it_otherwise(kinds: Path, bench) -> None:
    given_model(kinds / "given", POOLS["a map"])
    losses = []
    for share in ("0.0", "0.9", "0.5"):
        asked = ["--model.drop_path", share, "--trainer.max_steps", "1"]
        assert bench.run("--model.init_from", "given", "--run_dir", f"run{share}", *asked).code == 0
        losses.append(bench.rows(f"run{share}")[0]["loss"])
    assert len(set(losses)) == 3


@pytest.mark.parametrize("value", ["-0.1", "1", "2"])
def test_a_share_out_of_range_is_refused(kinds: Path, bench, value: str) -> None:
    given_model(kinds / "given", POOLS["a map"])
    done = bench.run("--model.init_from", "given", "--run_dir", "run", f"--model.drop_path={value}")
    assert done.code == 2
    assert "model.drop_path must be in [0, 1)" in done.err
