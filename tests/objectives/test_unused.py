"""No trained parameter is without a gradient, whatever the objective: what nothing reads is frozen and named."""

from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from small_objectives import CASES, ENCODER, TOKENIZER, bound, packed, random_records

from labelled import ready, records_of
from meristem.data.pack import pack
from meristem.data.parts import Part, RunData
from meristem.model.config import AttentionPool, Embedding, Prefix, SinCos2D, TransformerConfig
from meristem.model.heads import Readout
from meristem.model_directory import ModelCard, save_model
from meristem.objectives.objective import Objective
from meristem.objectives.supervised import Supervised, Target
from meristem.train.distilled import Distilled
from meristem.train.spec import ModelSpec
from meristem.train.task import Task
from meristem.types import PackedBatch, Record
from meristem_domains.vision.multi_crop import MultiCrop
from meristem_domains.vision.objectives.masked_patches import MaskedPatches
from meristem_domains.vision.objectives.self_distillation import SelfDistillation
from meristem_domains.vision.patches import PatchTokenizer

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
    _check_gradients(objective, config, packed(objective, records), reads_pool=name == "next sentence")


def _check_gradients(objective: Objective, config: TransformerConfig, batch: PackedBatch, reads_pool: bool) -> None:
    """See that a pool that nothing reads is frozen and named, and that all else gets gradients."""
    task = _configured(Task(ModelSpec(architecture=config, objective=objective)))
    out = objective.loss_of(task.model, task.extra, batch)
    torch.stack([term.sum for term in out.terms.values()]).sum().backward()
    trained = [*task.model.named_parameters(), *task.extra.named_parameters()]
    assert not [name for name, p in trained if p.requires_grad and p.grad is None]
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    pools = {key for key in task.model.state_dict() if key.startswith("pool.")}
    assert frozen == (set() if reads_pool else pools)
    named = [remark for remark in task.remarks if remark.startswith("frozen, since objective")]
    assert len(named) == bool(frozen)
    assert all(name in named[0] for name in frozen)


@pytest.mark.parametrize("has_teacher", [False, True])
@pytest.mark.parametrize("pool", ["mean", "own"])
def test_a_pool_that_no_label_reads_is_frozen(pool: str, has_teacher: bool, tmp_path: Path) -> None:
    records = records_of(["MKV", "AGK"], place=["a", "b"])
    targets = [Target(name="place", pool=pool)]
    objective: Objective = Supervised(targets)
    if has_teacher:
        card = ModelCard(ENCODER, TOKENIZER, {"place": Readout(name="place", classes=("a", "b"))})
        save_model(tmp_path / "teacher", card, card.build())
        objective = Distilled(targets, str(tmp_path / "teacher"))
    objective.bind(RunData(TOKENIZER, {"train": Part.of(records)}))
    tokens = [
        objective.prepare(record, ready(TOKENIZER.encode(record.payload)), np.random.default_rng(0))[0]
        for record in records
    ]
    _check_gradients(objective, replace(ENCODER, pool=POOL), pack(tokens, range(2)), reads_pool=pool == "own")


@pytest.mark.parametrize(
    ("make", "has_pool"), [(MaskedPatches, False), (MaskedPatches, True), (SelfDistillation, True)]
)
def test_every_trained_parameter_of_pictures_gets_a_gradient(make: type, has_pool: bool, rng) -> None:
    tokenizer = PatchTokenizer((16, 16), 4)
    config = replace(
        ENCODER,
        embedding=Embedding(vocab_size=1, patch_features=48),
        position=SinCos2D(),
        head=None,
        pool=Prefix(is_dense=True) if has_pool else None,
    )
    if make is MaskedPatches:
        objective: Objective = MaskedPatches(decoder_width=16, decoder_layers=1, decoder_heads=2)
    else:
        crops = MultiCrop(global_px=16, local_px=8, num_local=2)
        objective = SelfDistillation(crops=crops, num_prototypes=8, hidden_width=16, bottleneck_width=8)
    objective.bind_model(config)
    objective.bind(RunData(tokenizer))
    tokens, numbers = [], []
    for number in range(4):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        views = objective.prepare(Record.of("", pixels), ready(tokenizer.encode(pixels)), rng)
        tokens += views
        numbers += [number] * len(views)
    _check_gradients(objective, config, pack(tokens, numbers), reads_pool=make is SelfDistillation)


def test_a_pool_that_nobody_reads_would_lack_gradients(rng, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nothing is frozen."""
    monkeypatch.setattr(Task, "_freeze_unused", lambda task: None)
    with pytest.raises(AssertionError):
        test_every_trained_parameter_gets_a_gradient("masked", True, rng)
    with pytest.raises(AssertionError):
        test_every_trained_parameter_of_pictures_gets_a_gradient(MaskedPatches, True, rng)
    with pytest.raises(AssertionError):
        test_a_pool_that_no_label_reads_is_frozen("mean", True, tmp_path)
