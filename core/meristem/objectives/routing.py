"""What routers of expert layers are asked for beside the task: an even load and small logits; and how they do.

An objective adds `routing_terms` to its terms, `routing_counts` to its counts, `routing_figures` to its predictions
and targets, and `router_metrics` to its metrics (a module of its own, as torchmetrics takes seconds to import).
Without expert layers all of them are empty. Spare rows are left out everywhere.
"""

from collections.abc import Mapping

import torch

from meristem.model.config import TransformerConfig
from meristem.shapes import Float, Tensor
from meristem.types import SOURCE, Hidden, Layout, PackedBatch, Routing, Term

BALANCE = "router/balance"
Z = "router/z"
FIGURES = "router"
"""Key of the figures among predictions and targets."""

WEIGHTS = {BALANCE: "balance_weight", Z: "z_weight"}
"""Field of `Experts` that holds the weight of each term."""


def routing_terms(hidden: Hidden, config: TransformerConfig) -> dict[str, Term]:
    """The losses of routers, by name; those of weight 0 are left out.

    `router/balance` (Fedus 2021, arXiv 2101.03961, eq. 4-6) of one sequence in one layer is X times the sum over
    experts of f (the share of choices that fall on the expert, before anything is dropped) times P (its mean
    probability): 1 where the load is even. The term is its mean over sequences and expert layers. `transformers` has
    the same for one layer, one choice and sequences of equal length; with k choices k times as much; for several
    layers it takes f and P over the tokens of all layers of a stack, and adds up the two stacks. The paper adds up
    layers: there the weight counts for each layer, here for their mean.

    `router/z` (Zoph 2022, arXiv 2202.08906, eq. 5) is the mean over tokens and expert layers of the squared log of the
    sum of exponentials of the logits.

    Args:
        hidden: what the trunk gave; its source as well in an encoder-decoder.
    """
    routings = _routings(hidden, config)
    sums = {BALANCE: _balance_sum, Z: _z_sum}
    terms = {}
    for name, weights in _weights(config).items():
        top = max(weights.values())
        # where layers differ in weight, the sum bears what is lower than the highest
        total = torch.stack([sums[name](routings[i]) * (weight / top) for i, weight in weights.items()]).sum()
        count = sum(_count(name, routings[i].layout) for i in weights)
        terms[name] = Term(total, torch.tensor(float(count), device=total.device), top)
    return terms


def routing_counts(batch: PackedBatch, config: TransformerConfig) -> dict[str, float]:
    """What the terms of `routing_terms` count in a pack, known before the trunk runs."""
    layouts = {name: [_layout(batch, config, i) for i in weights] for name, weights in _weights(config).items()}
    return {name: float(sum(_count(name, layout) for layout in each)) for name, each in layouts.items()}


def routing_figures(hidden: Hidden, config: TransformerConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the metrics of routers need, as predictions and targets of a `LossOut`.

    Returns:
        Under `router`, of each expert layer and expert: choices that fell on it, those that it had no room for, and
        the sum of its probability over tokens: `[L, X, 3]`, zero where a layer has fewer experts; and tokens, `[L]`.
    """
    routings = _routings(hidden, config)
    if not routings:
        return {}, {}
    most = max(routing.logits.shape[1] for routing in routings.values())
    figures, tokens = [], []
    with torch.no_grad():
        for routing in routings.values():
            rows = slice(routing.layout.num_tokens)
            spread = torch.zeros(most, 3, dtype=torch.float64, device=routing.logits.device)
            chosen_N = routing.chosen[rows].flatten()
            is_dropped_N = ~routing.is_taken[rows].flatten()
            pairs_N2 = torch.stack([torch.ones_like(is_dropped_N), is_dropped_N], 1).to(spread)
            spread[:, :2].index_add_(0, chosen_N, pairs_N2)
            spread[: routing.logits.shape[1], 2] = routing.logits[rows].softmax(-1).sum(0, dtype=torch.float64)
            figures.append(spread)
            tokens.append(float(routing.layout.num_tokens))
    values_LX3 = torch.stack(figures)
    return {FIGURES: values_LX3}, {FIGURES: torch.tensor(tokens, device=values_LX3.device)}


def expert_layers(config: TransformerConfig) -> list[int]:
    """Layers that have experts, counted from 0 through both stacks."""
    return [i for i in range(config.total_layers) if config.layer(i).experts is not None]


def _weights(config: TransformerConfig) -> dict[str, dict[int, float]]:
    """The weight of each term in each expert layer, where it has one."""
    found: dict[str, dict[int, float]] = {}
    for name, field in WEIGHTS.items():
        weights = {i: float(getattr(config.layer(i).experts, field)) for i in expert_layers(config)}
        found[name] = {i: weight for i, weight in weights.items() if weight}
    return {name: weights for name, weights in found.items() if weights}


def _routings(hidden: Hidden, config: TransformerConfig) -> Mapping[int, Routing]:
    """What each expert layer did, of both stacks, in order of layers."""
    found = {**({} if hidden.source is None else hidden.source.routing), **hidden.routing}
    assert sorted(found) == expert_layers(config), f"layers {sorted(found)} have routed, not {expert_layers(config)}"
    return dict(sorted(found.items()))


def _layout(batch: PackedBatch, config: TransformerConfig, layer: int) -> Layout:
    is_encoder = config.num_decoder_layers and layer < config.num_layers
    return batch.sides[SOURCE].layout if is_encoder else batch.layout


def _count(name: str, layout: Layout) -> int:
    return layout.num_sequences if name == BALANCE else layout.num_tokens


def _balance_sum(routing: Routing) -> Float[Tensor, ""]:
    """X times the sum over experts of f times P, added up over sequences."""
    layout = routing.layout
    num, (rows, top_k), count = layout.num_tokens, routing.chosen.shape, routing.logits.shape[1]
    segment_T = layout.segment_of_row
    hits_SX = torch.zeros(len(layout.segments), count, device=routing.logits.device)
    # whole numbers, so exact in any order
    ones_N = torch.ones(rows * top_k, device=hits_SX.device)
    hits_SX.index_put_((segment_T.repeat_interleave(top_k), routing.chosen.flatten()), ones_N, accumulate=True)
    lengths_S = layout.cu_seqlens.diff().clamp(min=1).to(hits_SX)
    shares_SX = hits_SX / (top_k * lengths_S.square())[:, None]  # f / n, as P is a mean over n tokens
    probabilities_TX = routing.logits[:num].softmax(-1)
    return count * (shares_SX.index_select(0, segment_T[:num]) * probabilities_TX).sum()


def _z_sum(routing: Routing) -> Float[Tensor, ""]:
    return routing.logits[: routing.layout.num_tokens].logsumexp(-1).square().sum()
