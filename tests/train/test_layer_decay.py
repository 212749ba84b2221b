"""Layers learn at rates that fall by a factor from the heads down, under the very schedule that a run uses."""

import math

import pytest
import torch

from meristem.errors import ConfigError
from meristem.model.config import Attention, BucketBias, Causal, Embedding, FeedForward, LayerRule, TransformerConfig
from meristem.model.model import Model
from meristem.model.readout import Readout
from meristem.train import optim
from meristem.train.optim import OptimizerConfig, build_optimizer, parameter_groups

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
    return Model(config, (), (READOUT,))


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
