"""Losses and metrics of routers: their formulas, their counts, and what they must not see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func,
    router_z_loss_func,
)

from meristem.data.pack import pack
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    Experts,
    FeedForward,
    LayerRule,
    TokenHead,
    TransformerConfig,
)
from meristem.model.model import Model
from meristem.objectives.router_metrics import router_metrics
from meristem.objectives.routing import (
    BALANCE,
    FIGURES,
    Z,
    expert_layers,
    routing_counts,
    routing_figures,
    routing_terms,
)
from meristem.types import SOURCE, Hidden, Layout, PackedBatch, Routing, Tokens
from model_runs import specs

EXACT = {"rtol": 1e-5, "atol": 1e-6}  # fp32 sums over up to a few hundred rows


def config_of(experts: Experts | None, num_layers: int = 1, **changes: object) -> TransformerConfig:
    values = {
        "width": 16,
        "num_layers": num_layers,
        "embedding": Embedding(vocab_size=9),
        "attention": Attention(num_heads=2),
        "feedforward": FeedForward(width=24),
        "experts": experts,
        "head": TokenHead(),
    }
    return TransformerConfig(**{**values, **changes})


def random_routing(layout: Layout, count: int = 4, top_k: int = 1) -> Routing:
    """Routing of random rows, with some choices dropped."""
    logits = (2 * torch.randn(layout.num_rows, count)).requires_grad_()
    chosen = logits.detach().topk(top_k).indices
    return Routing(logits, chosen, torch.rand(chosen.shape) < 0.7, layout)


def hidden_of(*routings: Routing, source: Hidden | None = None, first: int = 0) -> Hidden:
    layout = routings[0].layout
    by_layer = {first + i: routing for i, routing in enumerate(routings)}
    return Hidden(torch.zeros(layout.num_rows, 16), layout, routing=by_layer, source=source)


def value(hidden: Hidden, config: TransformerConfig, name: str) -> torch.Tensor:
    term = routing_terms(hidden, config)[name]
    return term.sum / term.count


def slow_balance(routing: Routing) -> torch.Tensor:
    """X sum f P of each sequence, one after the other: `[S]`."""
    values = []
    for start, length in zip(routing.layout.starts, routing.layout.lengths):
        rows = slice(start, start + length)
        count, top_k = routing.logits.shape[1], routing.chosen.shape[1]
        chosen = routing.chosen[rows].flatten().tolist()
        shares = torch.tensor([chosen.count(expert) / (length * top_k) for expert in range(count)])
        values.append(count * (shares * routing.logits[rows].softmax(-1).mean(0)).sum())
    return torch.stack(values)


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_their_formulas_on_ragged_packs(top_k: int, rng: np.random.Generator) -> None:
    config = config_of(Experts(count=4, top_k=top_k, balance_weight=0.02, z_weight=0.003), num_layers=2)
    layout = Layout.of([3, 5, 5, 40])
    routings = [random_routing(layout, top_k=top_k) for _ in range(2)]
    terms = routing_terms(hidden_of(*routings), config)
    assert {name: term.weight for name, term in terms.items()} == {BALANCE: 0.02, Z: 0.003}
    assert {name: float(term.count) for name, term in terms.items()} == {BALANCE: 8, Z: 106}
    balance = torch.stack([slow_balance(routing) for routing in routings])
    torch.testing.assert_close(terms[BALANCE].sum, balance.sum(), **EXACT)
    z = sum(row.exp().sum().log() ** 2 for routing in routings for row in routing.logits)
    torch.testing.assert_close(terms[Z].sum, z, **EXACT)
    leaves = [routing.logits for routing in routings]
    for got, wanted in ((terms[BALANCE].sum, balance.sum()), (terms[Z].sum, z)):
        for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves)):
            torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_those_of_transformers_where_they_coincide(top_k: int, rng: np.random.Generator) -> None:
    config = config_of(Experts(count=5, top_k=top_k))
    routing = random_routing(Layout.of([12] * 4), count=5, top_k=top_k)
    logits_SnX = routing.logits.view(4, 12, 5)
    chosen_Snk = routing.chosen.view(4, 12, top_k)
    wanted = load_balancing_loss_func(logits_SnX.softmax(-1), chosen_Snk) / top_k
    torch.testing.assert_close(value(hidden_of(routing), config, BALANCE), wanted, **EXACT)
    torch.testing.assert_close(value(hidden_of(routing), config, Z), router_z_loss_func(logits_SnX), **EXACT)


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_even_load_costs_1_and_all_on_one_costs_most(top_k: int) -> None:
    config = config_of(Experts(count=4, top_k=top_k))
    layout = Layout.of([16])
    logits = torch.full((16, 4), -20.0)
    turns = torch.stack([torch.arange(16) % 4, (torch.arange(16) + 1) % 4], 1)[:, :top_k]
    even = Routing(logits.scatter(1, turns, 20.0), turns, torch.ones_like(turns, dtype=torch.bool), layout)
    assert value(hidden_of(even), config, BALANCE) == pytest.approx(1)
    ones = torch.arange(top_k).expand(16, top_k)
    uneven = Routing(logits.scatter(1, ones, 20.0), ones, torch.ones_like(ones, dtype=torch.bool), layout)
    assert value(hidden_of(uneven), config, BALANCE) == pytest.approx(4 / top_k)


def test_what_is_counted_over_the_pack_would_be_told_from_what_is_counted_over_sequences(
    rng: np.random.Generator,
) -> None:
    """The mutant: f and P of the whole pack. Two sequences, each all on an expert of its own, would seem even."""
    config = config_of(Experts(count=2))
    chosen = torch.arange(2).repeat_interleave(16)[:, None]
    logits = torch.full((32, 2), -20.0).scatter(1, chosen, 20.0)
    routing = Routing(logits, chosen, torch.ones_like(chosen, dtype=torch.bool), Layout.of([16, 16]))
    assert value(hidden_of(routing), config, BALANCE) == pytest.approx(2)
    mutant = replace(routing, layout=Layout.of([32]))
    assert value(hidden_of(mutant), config, BALANCE) == pytest.approx(1)


def test_sums_and_counts_of_packs_add_up_to_those_of_one_pack(rng: np.random.Generator) -> None:
    config = config_of(Experts(count=4, top_k=2))
    lengths = [int(n) for n in rng.integers(1, 30, 6)]
    whole = random_routing(Layout(tuple(lengths)), top_k=2)
    start, sums, counts = 0, {BALANCE: 0.0, Z: 0.0}, {BALANCE: 0.0, Z: 0.0}
    for part in (lengths[:1], lengths[1:4], lengths[4:]):
        rows = slice(start, start + sum(part))
        start += sum(part)
        routing = Routing(whole.logits[rows], whole.chosen[rows], whole.is_taken[rows], Layout(tuple(part)))
        for name, term in routing_terms(hidden_of(routing), config).items():
            sums[name] += term.sum.item()
            counts[name] += float(term.count)
    for name, term in routing_terms(hidden_of(whole), config).items():
        assert counts[name] == float(term.count)
        assert sums[name] == pytest.approx(term.sum.item(), rel=1e-5)


def test_spare_rows_count_for_nothing(rng: np.random.Generator) -> None:
    config = config_of(Experts(count=4, top_k=2))
    layout = Layout.of([2, 3])
    assert layout.num_spare == 11
    routing = random_routing(layout, top_k=2)
    other = random_routing(layout, top_k=2)
    mixed = replace(
        other,
        logits=torch.cat([routing.logits[:5], 50 * other.logits[5:]]),
        chosen=torch.cat([routing.chosen[:5], other.chosen[5:]]),
        is_taken=torch.cat([routing.is_taken[:5], ~other.is_taken[5:]]),
    )
    before, after = (routing_terms(hidden_of(one), config) for one in (routing, mixed))
    for name in (BALANCE, Z):
        assert torch.equal(before[name].sum, after[name].sum)
        assert torch.equal(before[name].count, after[name].count)
    figures = [routing_figures(hidden_of(one), config) for one in (routing, mixed)]
    for one, again in zip(*figures):
        assert torch.equal(one[FIGURES], again[FIGURES])
    assert figures[0][1][FIGURES].tolist() == [5]


def test_a_term_of_weight_0_is_left_out_and_layers_may_differ_in_weight(rng: np.random.Generator) -> None:
    layout = Layout.of([7, 20])
    first, second = random_routing(layout), random_routing(layout, count=3)
    heavy, light = Experts(count=4, balance_weight=0.4, z_weight=0.0), Experts(count=3, balance_weight=0.1, z_weight=0)
    config = config_of(heavy, num_layers=2, layers=(LayerRule(start=1, experts=light),))
    terms = routing_terms(hidden_of(first, second), config)
    assert list(terms) == [BALANCE]
    term = terms[BALANCE]
    wanted = (0.4 * slow_balance(first).sum() + 0.1 * slow_balance(second).sum()) / 4
    torch.testing.assert_close(term.weight * term.sum / term.count, wanted, **EXACT)
    silent = config_of(replace(heavy, balance_weight=0.0), num_layers=2)
    assert routing_terms(hidden_of(first, first), silent) == {}
    one = config_of(heavy, num_layers=2, layers=(LayerRule(start=1, experts=replace(light, balance_weight=0.0)),))
    term = routing_terms(hidden_of(first, second), one)[BALANCE]
    assert float(term.count) == 2
    torch.testing.assert_close(term.sum, slow_balance(first).sum(), **EXACT)


def test_without_experts_there_is_nothing() -> None:
    config = config_of(None)
    layout = Layout.of([20])
    hidden = Hidden(torch.zeros(20, 16), layout)
    assert routing_terms(hidden, config) == {}
    assert routing_figures(hidden, config) == ({}, {})
    assert router_metrics(config) == {}


def test_metrics_equal_their_formulas_over_several_packs(rng: np.random.Generator) -> None:
    config = config_of(Experts(count=4, top_k=2), num_layers=2, layers=(LayerRule(start=1, experts=Experts(count=3)),))
    packs = [Layout.of([4, 5]), Layout.of([30])]
    routings = [(random_routing(layout, top_k=2), random_routing(layout, count=3)) for layout in packs]
    metrics = router_metrics(config)
    for pair in routings:
        predictions, targets = routing_figures(hidden_of(*pair), config)
        for name, metric in metrics.items():
            key = name.partition("/")[0]
            metric.update(predictions[key], targets[key])
    busiest, entropies, dropped, sent = [], [], 0, 0
    for layer in range(2):
        rows = [slice(layout.num_tokens) for layout in packs]
        these = [pair[layer] for pair in routings]
        chosen = torch.cat([one.chosen[r].flatten() for one, r in zip(these, rows)]).tolist()
        taken = torch.cat([one.is_taken[r].flatten() for one, r in zip(these, rows)])
        mean = torch.cat([one.logits[r].softmax(-1) for one, r in zip(these, rows)]).mean(0)
        busiest.append(max(chosen.count(expert) for expert in range(4)) / len(chosen))
        entropies.append(-(mean * mean.log()).sum().item())
        dropped, sent = dropped + int((~taken).sum()), sent + len(chosen)
    got = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert got == pytest.approx(
        {
            "router/busiest_frac": np.mean(busiest),
            "router/entropy": np.mean(entropies),
            "router/dropped_frac": dropped / sent,
        },
        rel=1e-5,
    )


def random_tokens(rng: np.random.Generator, length: int, side: str = "") -> Tokens:
    return Tokens(np.arange(length)[:, None], rng.integers(0, 9, length), side=side)


def batch_of(rng: np.random.Generator, has_source: bool) -> PackedBatch:
    sequences = [random_tokens(rng, int(n)) for n in rng.integers(1, 12, 3)]
    records = [0, 1, 2]
    if has_source:
        sequences += [random_tokens(rng, int(n), side=SOURCE) for n in rng.integers(1, 12, 3)]
        records *= 2
    return pack(sequences, records)


@pytest.mark.parametrize("has_source", [False, True])
def test_counts_are_known_before_the_trunk_runs(has_source: bool, rng: np.random.Generator) -> None:
    """Two layers of an encoder with experts in the second; in a decoder of three, in its first and last."""
    if has_source:
        rules = (
            LayerRule(start=1, step=1, stop=3, experts=Experts(count=4, capacity=2)),
            LayerRule(start=4, experts=Experts(count=3, top_k=2)),
            LayerRule(start=2, attention=Attention(num_heads=2, pattern=Causal())),
        )
        config = config_of(None, num_layers=2, num_decoder_layers=3, layers=rules)
        assert expert_layers(config) == [1, 2, 4]
    else:
        config = config_of(Experts(count=4, capacity=2), num_layers=2)
    batch = batch_of(rng, has_source)
    hidden = Model(config, specs(("tokens",))).trunk(batch)
    terms = routing_terms(hidden, config)
    announced = routing_counts(batch, config)
    assert {name: float(term.count) for name, term in terms.items()} == announced
    tokens = batch.layout.num_tokens
    if has_source:
        assert batch.source is not None
        assert announced == {BALANCE: 9, Z: 2 * tokens + batch.source.layout.num_tokens}
    else:
        assert announced == {BALANCE: 6, Z: 2 * tokens}
    assert routing_figures(hidden, config)[0][FIGURES].shape == ((3, 4, 3) if has_source else (2, 4, 3))
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    for layer in expert_layers(config):
        stack, index = hidden, layer
        if has_source and layer < config.num_layers:
            assert hidden.source is not None
            stack = hidden.source
        assert stack.routing[index].logits.requires_grad
