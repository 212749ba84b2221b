"""Experts in packs and in low precision: bits that no neighbour changes, a router in fp32, jitter, first weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packs import config
from slow_experts import FORWARD, PARTS, layer_of, slow_experts
from torch import nn
from torch.nn import functional as F

from meristem.model import exact
from meristem.model.config import Experts, FeedForward, Init
from meristem.model.experts import ExpertsLayer
from meristem.model.feedforward import ACTIVATIONS
from meristem.model.init import init_weights
from meristem.train.optim import parameter_groups
from meristem.types import Layout


def alone_and_packed(layer: ExpertsLayer, rng: np.random.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of each sequence by itself and among others."""
    sequences = [torch.randn(int(n), 48) for n in sorted(rng.integers(1, 60, 12))]
    layout = Layout.of([len(x) for x in sequences])
    with torch.inference_mode():
        packed = layer(torch.cat(sequences), layout)[0].split(layout.lengths)
        pairs = []
        for x, among in zip(sequences, packed):
            own = Layout.of([len(x)])
            spare = torch.randn(own.num_spare, 48)
            pairs.append((layer(torch.cat([x, spare]), own)[0][: len(x)], among))
    return pairs


@pytest.mark.parametrize("name", PARTS)
def test_a_sequence_alone_has_the_bits_it_has_in_a_pack(name: str, rng: np.random.Generator) -> None:
    experts, feedforward = PARTS[name]
    layer = layer_of(experts, replace(feedforward, width=100), width=48)
    for alone, among in alone_and_packed(layer, rng):
        assert torch.equal(alone, among)


def test_without_spare_rows_of_an_expert_the_bits_would_differ(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "MIN_ROWS", 0)
    layer = layer_of(Experts(count=16), FeedForward(width=100), width=48)
    assert not all(torch.equal(alone, among) for alone, among in alone_and_packed(layer, rng))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_activation_rounds_by_where_an_element_stands(name: str, rng: np.random.Generator) -> None:
    for width in (7, 20, 36, 100):
        x = 3 * torch.randn(60, width)
        with torch.inference_mode():
            whole = ACTIVATIONS[name](x)
            for rows in range(1, 60):
                assert torch.equal(ACTIVATIONS[name](x[:rows].clone()), whole[:rows])
                assert torch.equal(ACTIVATIONS[name](x[rows:].clone()), whole[rows:])
        # two formulas of one function in fp32
        torch.testing.assert_close(whole.clone(), ACTIVATIONS[name](x), rtol=1e-5, atol=1e-6)


def test_spare_rows_disturb_nothing(rng: np.random.Generator) -> None:
    layer = layer_of(Experts(count=3, capacity=2), FeedForward(width=20))
    layout = Layout.of([3, 4])
    x = torch.randn(layout.num_rows, 32)
    other = torch.cat([x[:7], 100 * torch.randn(layout.num_spare, 32)])
    assert layout.num_spare > 0
    (one, first), (two, second) = layer(x, layout), layer(other, layout)
    assert torch.equal(one[:7], two[:7])
    assert torch.equal(first.is_taken[:7], second.is_taken[:7])


@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_router_works_in_fp32_whatever_the_weights(is_autocast: bool, rng: np.random.Generator) -> None:
    layer = layer_of(Experts(count=8, top_k=2), FeedForward(width=24, is_gated=True))
    x, layout = torch.randn(64, 32), Layout.of([64])
    if not is_autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        y, routing = layer(x, layout)
        low = F.linear(x.bfloat16(), layer.router.weight.bfloat16()).float()
    wanted = x.float() @ layer.router.weight.float().T
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, wanted, rtol=1e-5, atol=1e-5)  # fp32, 32 features
    assert torch.equal(routing.chosen, wanted.topk(2).indices)
    assert (low - wanted).abs().max() > 1e-3  # what bf16 would have given


@pytest.mark.parametrize("is_gated", [False, True])
def test_the_grouped_product_in_bf16_equals_one_product_an_expert(
    is_gated: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(Experts(count=4, top_k=2, capacity=6), FeedForward(width=24, is_gated=is_gated))
    x, layout = torch.randn(64, 32), Layout.of([24, 40])
    with torch.autocast("cpu", torch.bfloat16):
        single, _ = layer(x, layout)
        monkeypatch.setattr(ExpertsLayer, "_can_group", lambda self, x: True)
        grouped, _ = layer(x, layout)
    # bf16 has 8 bits, and an output is a sum of dozens of products
    torch.testing.assert_close(grouped, single, rtol=0.02, atol=0.02 * float(single.detach().abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARTS)
def test_on_a_gpu_the_grouped_product_equals_one_product_an_expert(name: str, rng: np.random.Generator) -> None:
    experts, feedforward = PARTS[name]
    layer = layer_of(experts, replace(feedforward, width=64), width=64)
    layout = Layout.of([24, 40, 100])
    x = torch.randn(164, 64)
    direction = torch.randn(164, 64)
    results = []
    for device in ("cpu", "cuda"):
        layer, ours = layer.to(device), x.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            assert device == "cpu" or layer._can_group(ours)
            y, routing = layer(ours, layout.to(torch.device(device)))
        leaves = [ours, *layer.parameters()]
        grads = torch.autograd.grad((y.float() * direction.to(device)).sum(), leaves)
        results.append([t.detach().float().cpu() for t in (routing.is_taken, y, *grads)])
    for one, other in zip(*results):
        # bf16 has 8 bits, and a gradient sums over a hundred rows
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(one.abs().max()))


def test_jitter_disturbs_the_router_in_training_and_nothing_else(rng: np.random.Generator) -> None:
    layer = layer_of(Experts(count=4, capacity=5, jitter=0.3), FeedForward(width=20))
    x, layout = torch.randn(40, 32), Layout.of([18, 22])
    exact = x @ layer.router.weight.T
    torch.testing.assert_close(layer(x, layout)[1].logits, exact, **FORWARD)
    layer.train()
    y, routing = layer(x, layout)
    assert (routing.logits - exact).abs().max() > 0.1
    assert not torch.equal(routing.logits, layer(x, layout)[1].logits)
    slow, _ = slow_experts(layer, x, layout, routing.logits)  # experts read x as it is
    torch.testing.assert_close(y, slow, **FORWARD)
    torch.manual_seed(5)
    first = layer(x, layout)[1].logits
    torch.manual_seed(5)
    assert torch.equal(first, layer(x, layout)[1].logits)


def test_every_parameter_has_initial_weights_and_its_name(rng: np.random.Generator) -> None:
    feedforward = FeedForward(width=20, is_gated=True)
    layer = ExpertsLayer(config(experts=Experts(count=4, num_shared=2), feedforward=feedforward).layer(0))
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    init_weights(layer, Init(std=0.05), num_layers=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "router.weight": (4, 32),
        "up": (4, 40, 32),
        "down": (4, 32, 20),
        "up_bias": (4, 40),
        "down_bias": (4, 32),
        "shared.up.weight": (80, 32),
        "shared.up.bias": (80,),
        "shared.down.weight": (32, 40),
        "shared.down.bias": (32,),
    }
    for name, value in layer.state_dict().items():
        if "bias" in name:
            assert not value.any()
        else:
            assert value.abs().max() <= 0.1  # cut at two deviations
            assert 0.03 < value.std() < 0.06  # a cut normal has .88 of the deviation; 128 values or more


def test_biases_of_experts_are_not_decayed_though_they_have_two_dimensions() -> None:
    layer = ExpertsLayer(config(experts=Experts(count=4)).layer(0))
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(layer, 0.1))
    assert decayed == {id(layer.up), id(layer.down), id(layer.router.weight)}
    assert plain == {id(layer.up_bias), id(layer.down_bias)}
