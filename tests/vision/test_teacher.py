"""The teacher of self-distillation: how it follows, that nothing collapses, and that a run goes on with it."""

import io
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_pictures import (
    CONFIG,
    CROPS,
    NUM_PROTOTYPES,
    built,
    objective_of,
    packed_views,
    picture_records,
    take_step,
    with_life,
)
from torch import nn

from meristem.cli.main import main
from meristem.model.config import Init
from meristem.train.ranks import Ranks
from meristem_domains.vision.objectives.self_distillation import (
    DISTILLATION,
    SelfDistillation,
    by_record,
    large_views,
)


def test_the_teacher_begins_as_the_student_and_follows_it(rng):
    objective = objective_of(momentum=0.9, center_momentum=0.8, warmup_steps=4, first_temperature=0.02)
    model, extra = built(objective, total_steps=10)
    teacher = extra["teacher"]
    pairs = list(teacher._pairs(model, extra["head"]))
    assert len(pairs) == len(list(teacher.parameters()))
    assert all(torch.equal(own, other) for own, other in pairs)
    slow = [own.clone().double() for own, _ in pairs]
    optimizer = torch.optim.SGD([*model.parameters(), *extra["head"].parameters()], lr=0.1)
    records, center = picture_records(rng, 4), torch.zeros(NUM_PROTOTYPES)
    for step in range(12):
        assert float(teacher.temperature) == pytest.approx(0.02 + 0.02 * min(1, step / 4))
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * min(1, step / 10)))
        assert float(teacher.momentum) == pytest.approx(momentum)
        batch = packed_views(objective, records, step)
        mean = teacher.scores(large_views(batch, 17)).mean(0)
        take_step(objective, model, extra, batch, optimizer)
        center = 0.8 * center + 0.2 * mean
        slow = [momentum * old + (1 - momentum) * other.double() for old, (_, other) in zip(slow, pairs)]
        torch.testing.assert_close(teacher.center, center, atol=1e-5, rtol=1e-5)
    for own, (wanted, (_, other)) in zip((own for own, _ in pairs), zip(slow, pairs)):
        torch.testing.assert_close(own.double(), wanted, atol=1e-5, rtol=1e-4)  # float32 against float64
        assert not torch.equal(own, other)
    # the mutant: no step behind the student leaves the teacher where it began
    frozen = [own.clone() for own, _ in pairs]
    objective.after_step = lambda model, extra, processes: None
    take_step(objective, model, extra, packed_views(objective, records), optimizer)
    assert all(torch.equal(own, old) for (own, _), old in zip(pairs, frozen))


def test_the_centre_is_that_of_all_packs_of_a_step_and_of_none_in_evaluation(rng):
    objective, (model, extra) = objective_of(center_momentum=0.0), built(objective_of(center_momentum=0.0))
    packs = [packed_views(objective, picture_records(rng, count), seed) for seed, count in enumerate((2, 5))]
    scores = torch.cat([extra["teacher"].scores(large_views(batch, 17)) for batch in packs])
    extra.eval()
    objective.loss_of(model, extra, packs[0])
    extra.train()
    for batch in packs:
        objective.loss_of(model, extra, batch)
    assert not extra["teacher"].center.any()
    objective.after_step(model, extra, Ranks())
    torch.testing.assert_close(extra["teacher"].center, scores.mean(0), atol=1e-6, rtol=1e-5)
    assert not extra["teacher"].training


def trained(rng: np.random.Generator, init: Init = CONFIG.init, without_center: bool = False, **options):
    """Figures of a short training on four kinds of pictures: by metric, and vectors and kinds."""
    mild = replace(CROPS, jitter=(0.1, 0.1, 0.1, 0.0), grey_rate=0.0, solarise_rate=0.0)
    objective = objective_of(**{"crops": mild, "momentum": 0.9, **options})
    records = picture_records(rng, 24)
    model, extra = built(objective, 80, replace(CONFIG, init=init))
    if without_center:
        extra["teacher"].remember = lambda scores: None
    optimizer = torch.optim.AdamW([*model.parameters(), *extra["head"].parameters()], lr=1e-3)
    packs = [packed_views(objective, records, seed) for seed in range(8)]
    for step in range(80):
        take_step(objective, model, extra, packs[step % 8], optimizer)
    extra.eval()
    batch = packed_views(objective, records, 99)
    with torch.no_grad():
        out = objective.loss_of(model, extra, batch)
        vectors = by_record(model.pool(model.trunk(batch).final, batch.layout), batch, 4)[:, 0]
    metrics = objective.metrics()
    for metric in metrics.values():
        metric.update(out.predictions[DISTILLATION], out.targets[DISTILLATION])
    figures = {name.partition("/")[2]: float(metric.compute()) for name, metric in metrics.items()}
    return figures, vectors, torch.tensor([record.labels["kind"] for record in records])


MOST = math.log(NUM_PROTOTYPES)


def test_it_learns_to_tell_apart_what_differs(rng):
    figures, vectors, kinds = trained(rng)
    assert 0 <= figures["teacher_entropy"] < figures["used_entropy"] < MOST
    # of the log 4 = 1.39 nats of four kinds; in 14 runs of 60 to 120 steps it was 0.81 to 1.44
    assert figures["used_entropy"] - figures["teacher_entropy"] > 0.5
    assert figures["gap"] >= 0
    unit = nn.functional.normalize(vectors, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    assert (kinds[nearest] == kinds).float().mean() > 0.7


ALIKE = Init(std=0.02)
"""Weights so small that all pictures are alike at first: nothing but centre and temperature keeps them apart."""


@pytest.mark.parametrize("is_centred", [True, False])
def test_without_its_centre_it_would_say_one_thing_of_all(rng, is_centred):
    figures, *_ = trained(rng, ALIKE, without_center=not is_centred, spread_weight=0.0)
    # seen: 2.49 and more with it, 0.00 without
    assert (figures["used_entropy"] > 0.5 * MOST) == is_centred
    assert (figures["used_entropy"] < 0.05 * MOST) != is_centred


@pytest.mark.parametrize("is_sharp", [True, False])
def test_without_sharpening_it_would_say_nothing_of_any(rng, is_sharp):
    temperature = 0.04 if is_sharp else 1.0
    figures, *_ = trained(rng, teacher_temperature=temperature, first_temperature=temperature)
    # seen: 0.00 to 0.24, and 2.77, which is all there is
    assert (figures["teacher_entropy"] > 0.99 * MOST) != is_sharp
    assert (figures["teacher_entropy"] < 0.5 * MOST) == is_sharp


def test_figures_are_those_of_the_distributions(rng):
    objective = objective_of()
    model, extra = built(objective)
    with_life(extra)
    batch = packed_views(objective, picture_records(rng, 5))
    out = objective.loss_of(model, extra, batch)
    figures = {}
    for name, metric in objective.metrics().items():
        half = len(out.targets[DISTILLATION]) // 2
        metric.update(out.predictions[DISTILLATION][:half], out.targets[DISTILLATION][:half])
        metric.update(out.predictions[DISTILLATION][half:], out.targets[DISTILLATION][half:])
        figures[name] = float(metric.compute())
    targets = out.targets[DISTILLATION].double()
    entropy = float(-(targets * targets.log()).sum(1).mean())
    mean = targets.mean(0)
    assert figures[f"{DISTILLATION}/teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert figures[f"{DISTILLATION}/used_entropy"] == pytest.approx(float(-(mean * mean.log()).sum()), rel=1e-5)
    loss = float(out.terms[DISTILLATION].sum.detach() / out.terms[DISTILLATION].count)
    assert figures[f"{DISTILLATION}/gap"] == pytest.approx(loss - entropy, abs=1e-5)


@pytest.mark.parametrize("forgotten", [None, "center", "step", "head.prototypes"])
def test_a_run_goes_on_from_what_was_saved_bit_for_bit(rng, forgotten):
    objective = objective_of(momentum=0.5, warmup_steps=6, first_temperature=0.02)
    packs = [packed_views(objective, picture_records(rng, 4), seed) for seed in range(6)]
    seed = int(rng.integers(2**31))

    def fresh():
        torch.manual_seed(seed)
        model, extra = built(objective)
        return model, extra, torch.optim.AdamW([*model.parameters(), *extra["head"].parameters()], lr=1e-3)

    model, extra, optimizer = fresh()
    for batch in packs[:3]:
        take_step(objective, model, extra, batch, optimizer)
    stream = io.BytesIO()
    torch.save([one.state_dict() for one in (model, extra, optimizer)], stream)
    whole = [take_step(objective, model, extra, batch, optimizer) for batch in packs[3:]]
    stream.seek(0)
    states = torch.load(stream, weights_only=True)
    again = fresh()
    if forgotten is not None:
        states[1][f"teacher.{forgotten}"] = again[1].state_dict()[f"teacher.{forgotten}"]
    for one, state in zip(again, states):
        one.load_state_dict(state)
    assert [take_step(objective, *again[:2], batch, again[2]) for batch in packs[3:]] == whole or forgotten
    same = all(torch.equal(a, b) for a, b in zip(extra.state_dict().values(), again[1].state_dict().values()))
    assert same == (forgotten is None)


CONFIG_FILE = """
model:
  architecture: {preset: vit_digits, width: 32, num_layers: 2, position: {kind: SinCos2D}}
  objective:
    class_path: SelfDistillation
    init_args:
      crops: {global_px: 8, local_px: 4, num_local: 2, blur_px: [0.1, 0.5]}
      num_prototypes: 32
      hidden_width: 32
      bottleneck_width: 16
      warmup_steps: 5
  optimizer: {lr: 1e-3, warmup_steps: 2}
data:
  domain: vision
  sources: pictures
  tokenizer: {image_px: 8, patch_px: 2, num_channels: 1}
  tokens_per_batch: 512
  split: {validation_frac: 0.3}
trainer: {max_steps: 8, accelerator: cpu, enable_progress_bar: false, accumulate_grad_batches: 2, logger: false}
watch: {validate_every_n_steps: 4, save_every_n_steps: 4, monitor: distillation/gap}
"""


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_never_stopped(rng, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for record in picture_records(rng, 40):
        (tmp_path / "pictures" / f"{record.id}.png").write_bytes(record.payload)
    (tmp_path / "views.yaml").write_text(CONFIG_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    fit = ["fit", "--config", "views.yaml", "--run_dir"]
    assert main([*fit, "whole"]) == 0

    follow = SelfDistillation.after_step

    def stop_at_third(self, model, extra, processes):
        follow(self, model, extra, processes)
        if int(extra["teacher"].step) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(SelfDistillation, "after_step", stop_at_third)
        assert main([*fit, "broken"]) == 143
    assert main([*fit, "broken"]) == 0
    states = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "broken")
    ]
    whole, broken = (state["state_dict"] for state in states)
    assert {name.split(".")[1] for name in whole if name.startswith("extra.")} == {"head", "teacher"}
    assert int(whole["extra.teacher.step"]) == 8
    assert whole["extra.teacher.center"].any()
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    # what has moments is what is trained
    num_trained = sum(not name.startswith("extra.teacher.") for name in whole)
    assert len(states[0]["optimizer_states"][0]["state"]) == num_trained
