"""Every target weighs the same, however a step is packed, accumulated and shared out."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from labelled import ready, run_data
from meristem.data.pack import pack
from meristem.data.parts import RunData
from meristem.domain import load_domain
from meristem.model.config import Attention, Embedding, FeedForward, TokenHead, TransformerConfig
from meristem.model.heads.labels import Standardise
from meristem.model.model import Model
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.supervised import Supervised, Target
from meristem.train.optim import OptimizerConfig, lr_factor, parameter_groups
from meristem.train.recorder import MetricsFile
from meristem.train.spec import ModelSpec
from meristem.train.task import Task, fold
from meristem.types import Record
from model_runs import specs

TOKENIZER = load_domain("protein").tokenizer()
ARCHITECTURE = TransformerConfig(
    width=32,
    num_layers=2,
    embedding=Embedding(vocab_size=33, mask_id=32, mask_dropout_frac=0.12),
    attention=Attention(num_heads=4),
    feedforward=FeedForward(width=64),
    head=TokenHead(),
)


class _Trainer:
    """What a training step asks of Lightning."""

    def __init__(self, accumulate: int):
        self.accumulate_grad_batches, self.world_size, self.global_rank, self.global_step = accumulate, 1, 0, 0
        self.ckpt_path = None
        self.max_steps = 1


def _gradients(objective, packs) -> dict[str, torch.Tensor]:
    """Gradients of one optimiser step over these packs, as Lightning takes them: each loss over their number."""
    task = Task(ModelSpec(architecture=ARCHITECTURE, objective=objective), seed=3)
    task._trainer = _Trainer(len(packs))
    task.configure_model()
    counts: dict[str, float] = {}
    for batch in packs:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    for i, batch in enumerate(packs):
        batch.step_counts.update(counts)  # type: ignore[attr-defined]
        (task.training_step(batch, i) / len(packs)).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def _prepared(objective, rng, labels=None) -> list:
    sequences = ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), rng.integers(3, 60))) for _ in range(9)]
    tokens = []
    for i, sequence in enumerate(sequences):
        record = Record.of(str(i), sequence, labels(i, sequence) if labels else {}, f"x:{i}")
        tokens += objective.prepare(record, ready(TOKENIZER.encode(sequence)), np.random.default_rng(i))
    return tokens


def _some_labels(i: int, sequence: str) -> dict:
    labels = {"place": "abc"[i % 3], "score": str(i), "states": "HEC"[i % 3] * (len(sequence) - 1) + "H"}
    for k, name in enumerate(list(labels)):
        if i % 4 == k:
            del labels[name]
    return labels


def _supervised() -> Supervised:
    objective = Supervised(
        [
            Target(name="place", class_weights=[1.0, 2.0, 5.0]),
            Target(name="score", task="regression", weight=0.3),
            Target(name="states", level="token", class_weights="balanced"),
        ]
    )
    states = ["HEC", None, None, None, None]
    columns = {"place": ["a", "b", "c", "a", None], "score": ["0", "5", "1", None, "9"], "states": states}
    objective.bind(run_data(TOKENIZER, ["MKV"] * 5, **columns))
    return objective


def _masked() -> MaskedTokens:
    objective = MaskedTokens(rate=0.3)
    objective.bind(RunData(TOKENIZER))
    return objective


@pytest.mark.parametrize("make", [_masked, _supervised])
def test_gradient_of_a_step_does_not_depend_on_how_it_is_packed(make, rng):
    objective = make()
    tokens = _prepared(objective, rng, _some_labels if make is _supervised else None)
    whole = _gradients(objective, [pack(tokens, range(9))])
    cuts = np.sort(rng.choice(np.arange(1, 9), 3, replace=False))
    parts = [pack(tokens[a:b], range(a, b)) for a, b in zip([0, *cuts], [*cuts, 9])]
    split = _gradients(objective, parts)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        # fp32 sums in another order: 1e-6 of a gradient of this size
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # the mutant: a mean of the packs' means, as Lightning alone would have it, is far off
    for batch in parts:
        batch.step_counts.clear()
    means = _gradients_of_means(objective, parts)
    assert max((means[name] - whole[name]).abs().max() for name in whole) > 1e-4


def _gradients_of_means(objective, packs) -> dict[str, torch.Tensor]:
    task = Task(ModelSpec(architecture=ARCHITECTURE, objective=objective), seed=3)
    task._trainer = _Trainer(len(packs))
    task.configure_model()
    for batch in packs:
        terms = objective.loss_of(task.model, task.extra, batch).terms.values()
        sum(t.weight * t.sum / t.count for t in terms if t.count).div(len(packs)).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def test_counts_known_before_the_trunk_are_those_of_the_loss(rng):
    for objective, labels in ((_masked(), None), (_supervised(), _some_labels)):
        batch = pack(_prepared(objective, rng, labels), range(9))
        model = Model(ARCHITECTURE, objective.heads)
        terms = objective.loss_of(model, objective.build(ARCHITECTURE), batch).terms
        counts = objective.counts(batch)
        assert terms.keys() == counts.keys()
        for name, term in terms.items():
            assert float(term.count) == pytest.approx(counts[name], rel=1e-6)


def test_groups_decay_linear_maps_alone_and_cover_every_parameter():
    model = Model(ARCHITECTURE, specs(("tokens",)))
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert any("embedding" in names[id(p)] for p in plain["params"])
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    model.trunk.requires_grad_(False)
    assert {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]} == {
        id(p) for p in model.heads.parameters()
    }


@pytest.mark.parametrize("count", [1, 3])
def test_running_figures_move_at_the_end_of_a_step_by_all_packs_in_their_order(count, rng):
    def shares() -> list[list[torch.Tensor]]:
        """Rows of the packs of each micro-step, by rank; one record, as a pack may hold, is no figure of a spread."""
        return [[torch.randn(int(rng.integers(1, 6)), 7) for _ in range(count)] for _ in range(2)]

    layers = [Standardise(7).train() for _ in range(count)]
    mean, var = torch.zeros(7), torch.ones(7)
    for _ in range(3):
        micro_steps = shares()
        for packs in micro_steps:
            for layer, rows in zip(layers, packs):
                before = layer.mean.clone()
                made = layer(rows)
                assert torch.equal(layer.mean, before)
                if len(rows) > 1:
                    assert torch.equal(made, F.batch_norm(rows, mean.clone(), var.clone(), training=True, eps=1e-10))
        for layer in layers:
            layer.take_in(Mock(side_effect=micro_steps))
        for rows in (rows for packs in micro_steps for rows in packs if len(rows) > 1):
            F.batch_norm(rows, mean, var, training=True, eps=1e-10)
        assert all(torch.equal(layer.mean, mean) and torch.equal(layer.var, var) for layer in layers)
    layers[0].eval()
    rows = torch.randn(4, 7)
    assert torch.equal(layers[0](rows), F.batch_norm(rows, mean, var, eps=1e-10))
    layers[0].take_in(lambda rows: [rows])  # nothing is learnt from an evaluation
    assert torch.equal(layers[0].mean, mean)


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
def test_learning_rate_rises_to_its_highest_and_falls_to_its_least(schedule):
    factor = lr_factor(OptimizerConfig(warmup_steps=10, schedule=schedule, min_lr_frac=0.1), 1000)
    values = [factor(step) for step in range(1001)]
    assert values[:10] == sorted(values[:10])
    assert max(values) == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert min(values[10:]) >= 0.1
    if schedule == "cosine":
        assert values[1000] == pytest.approx(0.1)


def test_seeds_differ_in_every_part():
    seeds = {fold(s, "step", n, m, r) for s in range(2) for n in range(20) for m in range(3) for r in range(3)}
    assert len(seeds) == 2 * 20 * 3 * 3


def test_metrics_file_keeps_what_is_done_and_drops_what_comes_again(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in range(1, 6):
        file.add({"step": step, "loss": step / 3}, ["step", "loss", "val/loss"])
    with file.path.open("a") as stream:
        stream.write("6,0.1")  # half a row, as a kill leaves it
    again = MetricsFile(file.path)
    again.keep_up_to(4)
    assert file.path.read_text() == "step,loss,val/loss\n" + "".join(f"{n},{n / 3!r},\n" for n in range(1, 5))
    again.add({"step": 5, "loss": 5 / 3}, ["step", "loss", "val/loss"])
    assert file.path.read_text().endswith(f"5,{5 / 3!r},\n")
