"""No trained parameter is without a gradient, whatever the objective: what nothing reads is frozen and named."""

from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from small_objectives import CASES, ENCODER, TOKENIZER, bound, packed, random_records

from labelled import ready, records_of
from meristem.data.pack import pack
from meristem.data.parts import Part, RunData
from meristem.model.config import AttentionPool
from meristem.objectives.supervised import Supervised, Target
from meristem.train.spec import ModelSpec
from meristem.train.task import Task

POOL = AttentionPool(num_heads=4, feedforward_width=16)


def _configured(task: Task) -> Task:
    task.trainer = L.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False)
    task.configure_model()
    return task


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_pool", [False, True])
def test_every_trained_parameter_gets_a_gradient(name: str, has_pool: bool, rng) -> None:
    make, config = CASES[name]
    if has_pool:
        config = replace(config, pool=POOL)
    records = random_records(rng, count=12, low=6)
    objective = bound(make(), config, records)
    task = _configured(Task(ModelSpec(architecture=config, objective=objective)))
    out = objective.loss_of(task.model, task.extra, packed(objective, records))
    torch.stack([term.sum for term in out.terms.values()]).sum().backward()
    lacking = [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    pools = {key for key in task.model.state_dict() if key.startswith("pool.")}
    assert frozen == (set() if name == "next sentence" else pools)
    named = [remark for remark in task.remarks if remark.startswith("frozen, since objective")]
    assert len(named) == bool(frozen)
    assert all(name in named[0] for name in frozen)


@pytest.mark.parametrize("pool", ["mean", "own"])
def test_a_pool_that_no_label_reads_is_frozen(pool: str) -> None:
    records = records_of(["MKV", "AGK"], place=["a", "b"])
    objective = Supervised([Target(name="place", pool=pool)])
    objective.bind(RunData(TOKENIZER, {"train": Part.of(records)}))
    task = _configured(Task(ModelSpec(objective=objective, architecture=replace(ENCODER, pool=POOL))))
    tokens = [
        objective.prepare(record, ready(TOKENIZER.encode(record.payload)), np.random.default_rng(0))[0]
        for record in records
    ]
    objective.loss_of(task.model, task.extra, pack(tokens, range(2))).terms["place"].sum.backward()
    assert not [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    assert frozen == ({key for key in task.model.state_dict() if key.startswith("pool.")} if pool == "mean" else set())


def test_a_pool_that_nobody_reads_would_lack_gradients(rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nothing is frozen."""
    monkeypatch.setattr(Task, "_freeze_unused", lambda task: None)
    with pytest.raises(AssertionError):
        test_every_trained_parameter_gets_a_gradient("masked", True, rng)
