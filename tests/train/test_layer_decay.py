"""Layers learn at rates that fall by a factor from the heads down, under the very schedule that a run uses."""

import math

import pytest
import torch

from meristem.errors import ConfigError
from meristem.model.config import Attention, BucketBias, Causal, Embedding, FeedForward, LayerRule, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import Model
from meristem.train import optim
from meristem.train.optim import OptimizerConfig, build_optimizer, parameter_groups
from meristem.train.task import Task
from model_runs import specs

DECAY = 0.65
READOUT = Readout(name="label", level="record", task="classification", classes=("a", "b"))


def _model(num_layers: int = 3, num_decoder_layers: int = 0) -> Model:
    attention = Attention(num_heads=2)
    causal = LayerRule(start=num_layers, attention=Attention(num_heads=2, pattern=Causal()))
    config = TransformerConfig(
        width=8,
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        embedding=Embedding(vocab_size=5),
        position=BucketBias(num_buckets=4, max_distance=8),
        attention=attention,
        feedforward=FeedForward(width=16),
        layers=(causal,) if num_decoder_layers else (),
    )
    return Model(config, specs((), (READOUT,)))


def _expected_depth(name: str, num_layers: int, total: int) -> int:
    """By the name alone: the slow and obvious way."""
    parts = name.split(".")
    if "embedding" in parts or "positions" in parts:
        return 0
    if "blocks" in parts:
        first = num_layers if "decoder" in parts else 0
        return first + int(parts[parts.index("blocks") + 1]) + 1
    if "encoder" in parts:
        return num_layers + 1
    return total + 1


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("num_decoder_layers", [0, 2])
def test_rates_differ_by_depth_at_every_step_of_the_schedule(schedule, num_decoder_layers):
    model = _model(3, num_decoder_layers)
    config = OptimizerConfig(lr=0.01, warmup_steps=2, schedule=schedule, layer_decay=DECAY)
    optimizer, scheduler = build_optimizer(model, config, 10)
    top = 3 + num_decoder_layers + 1
    for step in range(6):
        rates = _rates(optimizer)
        highest = config.lr * optim.lr_factor(config, 10)(step)
        for name, parameter in model.named_parameters():
            depth = _expected_depth(name, 3, 3 + num_decoder_layers)
            # products of doubles in another order
            assert math.isclose(rates[id(parameter)], highest * DECAY ** (top - depth), rel_tol=1e-12), name
        optimizer.step()
        scheduler.step()
    assert len(set(rates.values())) == top + 1


def test_updates_scale_with_depth():
    """AdamW's first step moves each weight by its rate, whatever the gradient."""
    model = _model()
    optimizer, _ = build_optimizer(model, OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=0, layer_decay=DECAY), 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter.detach()).abs().max()
        # the schedule's first factor is 1 without warm-up; fp32 rounds at 1e-7 of weights near 1
        assert float(moved) == pytest.approx(0.1 * DECAY ** (4 - _expected_depth(name, 3, 3)), rel=1e-4), name


Rates = list[dict[str, float]]


def _rates_of_run(bench, monkeypatch, *arguments: str) -> Rates:
    """By parameter, those that each optimiser step of a real run is taken with."""
    seen: Rates = []
    take_step = Task.optimizer_step

    def spy(self, epoch, batch_idx, optimizer, *rest, **named):
        rates = _rates(optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer)
        seen.append({name: rates[id(parameter)] for name, parameter in self.model.named_parameters()})
        take_step(self, epoch, batch_idx, optimizer, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "optimizer_step", spy)
        done = bench.run("--model.optimizer.layer_decay", str(DECAY), *arguments)
    assert done.code == 0, done.err
    return seen


def _refuse_rates(seen: Rates, config: OptimizerConfig, max_steps: int, first: int = 0) -> None:
    """The check that a run must pass and no mutant may: of the two layers of `bench`, and what is around them."""
    assert len(seen) == max_steps - first
    for step, rates in enumerate(seen, first):
        highest = config.lr * optim.lr_factor(config, max_steps)(step)
        for name, rate in rates.items():
            wanted = highest * DECAY ** (3 - _expected_depth(name, 2, 2))
            assert math.isclose(rate, wanted, rel_tol=1e-12), f"step {step}, {name}: rate {rate}, not {wanted}"
        assert len(set(rates.values())) == 4, "embedding, two layers, and what stands above them"


def test_rates_of_a_real_run_differ_by_depth_at_every_step(bench, monkeypatch):
    config = OptimizerConfig(lr=1e-3, warmup_steps=5)
    seen = _rates_of_run(bench, monkeypatch, "--trainer.max_steps", "9", "--run_dir", "run")
    _refuse_rates(seen, config, 9)
    # what is written down is the rate of the heads
    rows = [float(row["lr"]) for row in bench.rows("run") if row["lr"]]
    assert rows == pytest.approx([max(rates.values()) for rates in seen], rel=1e-12)


def test_rates_are_the_same_when_a_run_goes_on(bench, monkeypatch):
    bench.replace("warmup_steps: 5", "warmup_steps: 5, schedule: inverse_sqrt")  # which knows no last step
    config = OptimizerConfig(lr=1e-3, warmup_steps=5, schedule="inverse_sqrt")
    _refuse_rates(_rates_of_run(bench, monkeypatch, "--trainer.max_steps", "4", "--run_dir", "run"), config, 4)
    seen = _rates_of_run(bench, monkeypatch, "--trainer.max_steps", "9", "--run_dir", "run")
    _refuse_rates(seen, config, 9, first=4)


class _OneRate(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that gives all groups the rate of the optimiser."""

    def get_lr(self):
        return [self.optimizer.defaults["lr"] * self.lr_lambdas[0](self.last_epoch)] * len(self.base_lrs)


def _groups_without_scales(model, weight_decay, layer_decay=1.0):
    return [{**group, "lr_scale": 1.0} for group in parameter_groups(model, weight_decay, layer_decay)]


@pytest.mark.parametrize(
    ("name", "mutant"),
    [("LambdaLR", _OneRate), ("parameter_groups", _groups_without_scales)],
    ids=["schedule", "groups"],
)
def test_a_run_with_one_rate_for_all_is_caught(bench, monkeypatch, name, mutant):
    monkeypatch.setattr(optim, name, mutant)
    seen = _rates_of_run(bench, monkeypatch, "--trainer.max_steps", "3", "--run_dir", "run")
    with pytest.raises(AssertionError, match="rate"):
        _refuse_rates(seen, OptimizerConfig(lr=1e-3, warmup_steps=5), 3)


def test_a_scale_that_is_only_written_down_would_be_seen(monkeypatch):
    """The mutant: `lr_scale` in the groups and no more, which schedules of torch do not read."""

    def only_written(model, weight_decay, layer_decay=1.0):
        return [{**group, "lr": 0.01, "scale": group.pop("lr_scale")} for group in groups(model, 0.1, layer_decay)]

    groups = parameter_groups
    model = _model()
    optimizer = torch.optim.AdamW(only_written(model, 0.1, DECAY), lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert len({group["scale"] for group in optimizer.param_groups}) == 5
    assert len(set(_rates(optimizer).values())) == 1  # what the tests above would refuse


def test_without_layer_decay_all_learn_alike_in_two_groups():
    optimizer, _ = build_optimizer(_model(), OptimizerConfig(), 5)
    assert len(optimizer.param_groups) == 2
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_layer_decay_covers_every_parameter_once_and_decays_the_same_ones():
    model = _model()
    plain, layered = parameter_groups(model, 0.1), parameter_groups(model, 0.1, DECAY)
    for decay in (0.0, 0.1):
        wanted, got = (
            [id(p) for group in groups if group["weight_decay"] == decay for p in group["params"]]
            for groups in (plain, layered)
        )
        assert sorted(wanted) == sorted(got)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_layer_decay_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match="layer_decay must be above 0"):
        OptimizerConfig(layer_decay=value)
