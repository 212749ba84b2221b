"""Averaged weights are those that a run validates and saves, and going on leaves them as they would have been."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from meristem.train.ema import MovingAverage
from meristem.train.task import Task

DECAY = 0.9


def _last(bench, run: str) -> dict:
    return torch.load(bench.path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def _with_average(bench) -> None:
    bench.replace("  dropout: 0.1\n  objective", f"  dropout: 0.1\n  ema_decay: {DECAY}\n  objective")
    bench.replace("max_steps: 40", "max_steps: 9")


def test_average_is_the_sum_that_its_rule_spells_out(rng):
    model, extra = nn.Linear(3, 2), nn.ModuleDict({"head": nn.Linear(2, 2)})
    average = MovingAverage(DECAY, model, extra)
    expected = model.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += torch.from_numpy(rng.normal(size=(2, 3))).float()
            extra["head"].bias += 1
        average.update(model, extra, step)
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    # 30 sums in fp32 of values up to 20
    torch.testing.assert_close(average.model.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(average.extra["head"].bias, extra["head"].bias)
    assert not any(p.requires_grad for p in average.parameters())


def test_what_is_not_trained_is_shared_and_buffers_are_taken_as_they_are():
    model, extra = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.ModuleDict()
    model[0].requires_grad_(False)
    average = MovingAverage(DECAY, model, extra)
    assert average.model[0].weight is model[0].weight
    model[1].running_mean += 5
    average.update(model, extra, 1)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert average.model[1].running_mean is not model[1].running_mean


@pytest.mark.parametrize("is_mutant", [False, True])
def test_saved_models_hold_the_average_and_not_the_last_weights(bench, monkeypatch, is_mutant):
    """The last model and the best, which is of the last step here as well; the mutant saves what is trained."""
    _with_average(bench)
    bench.replace("save_every_n_steps: 3", "save_every_n_steps: 9")
    bench.replace("validate_every_n_steps: 7", "validate_every_n_steps: 9")
    if is_mutant:
        monkeypatch.setattr(Task, "evaluated", property(lambda self: self.model))
    assert bench.run("--run_dir", "run").code == 0
    state = _last(bench, "run")
    for folder in ("model-last", "model"):
        saved = load_file(bench.path / "run" / folder / "model.safetensors")
        is_average = [torch.equal(value, state[f"average.model.{name}"]) for name, value in saved.items()]
        is_trained = [torch.equal(value, state[f"model.{name}"]) for name, value in saved.items()]
        assert all(is_average) != is_mutant, folder
        assert all(is_trained) == is_mutant, folder


def test_validation_uses_the_average(bench, monkeypatch):
    """The loss in `metrics.csv` is that of the saved model, which holds the average; the mutant's is not."""

    def losses(run: str) -> tuple[float, float]:
        done = bench.run("--run_dir", run)
        assert done.code == 0, done.err
        validated = bench.run("--run_dir", run, verb="validate")
        assert validated.code == 0, validated.err
        said = [line.split() for line in validated.out.splitlines()]
        (again,) = [float(words[1]) for words in said if words[0] == "loss"]
        rows = [row for row in bench.rows(run) if row["val/loss"]]
        return min(float(row["val/loss"]) for row in rows), again

    _with_average(bench)
    of_run, of_model = losses("run")
    # printed with five digits
    assert of_run == pytest.approx(of_model, rel=1e-4)
    step = Task.validation_step

    def mutant(self, batch, batch_idx):
        average, self.average = self.average, None
        try:
            step(self, batch, batch_idx)
        finally:
            self.average = average

    monkeypatch.setattr(
        Task,
        "validation_step",
        lambda self, *a: mutant(self, *a) if self.trainer.state.fn == "fit" else step(self, *a),
    )
    of_run, of_model = losses("mutant")
    assert of_run != pytest.approx(of_model, rel=1e-4)


@pytest.mark.parametrize("is_mutant", [False, True])
def test_going_on_leaves_the_average_as_it_would_have_been(bench, monkeypatch, is_mutant):
    _with_average(bench)
    bench.replace("warmup_steps: 5", "schedule: constant")  # so that max_steps may change
    assert bench.run("--run_dir", "whole", "--trainer.max_steps", "7").code == 0
    assert bench.run("--run_dir", "broken", "--trainer.max_steps", "4").code == 0
    if is_mutant:  # an average that begins anew
        load = Task.on_load_checkpoint

        def forget(self, checkpoint):
            load(self, checkpoint)
            state = checkpoint["state_dict"]
            for name in [name for name in state if name.startswith("average.model.")]:
                state[name] = state[name.removeprefix("average.")]

        monkeypatch.setattr(Task, "on_load_checkpoint", forget)
    assert bench.run("--run_dir", "broken", "--trainer.max_steps", "7").code == 0
    files = (bench.path / run / "model-last" / "model.safetensors" for run in ("whole", "broken"))
    whole, broken = (file.read_bytes() for file in files)
    assert (whole == broken) != is_mutant
    # both validate at step 7
    assert (bench.rows("whole")[-1] == bench.rows("broken")[-1]) != is_mutant


@pytest.mark.parametrize("value", ["0", "1", "1.2"])
def test_a_decay_out_of_range_is_refused(bench, value):
    done = bench.run("--run_dir", "run", "--model.ema_decay", value)
    assert done.code == 2
    assert "ema_decay must be above 0 and below 1" in done.err


def test_decay_begins_low(rng):
    average = MovingAverage(0.999, nn.Linear(1, 1), nn.ModuleDict())
    decays = np.array([average.decay_at(step) for step in range(1, 20_000)])
    assert decays[0] == pytest.approx(2 / 11)
    assert (np.diff(decays) >= 0).all()
    assert decays[-1] == 0.999
