"""Layers of experts for tests, and the oracle: a loop over tokens."""

import numpy as np
import torch
from packs import config

from meristem.model.config import Experts, FeedForward
from meristem.model.experts import ExpertsLayer
from meristem.types import Layout

FORWARD = {"rtol": 1e-5, "atol": 1e-5}  # fp32; outputs are of order 1, products of up to 52 features
BACKWARD = {"rtol": 1e-4, "atol": 1e-4}  # gradients are sums over up to 80 rows

PARTS = {
    "top-1": (Experts(count=4), FeedForward(width=20, activation="relu", in_bias=False, out_bias=False)),
    "top-1, room for 2": (Experts(count=4, capacity=2), FeedForward(width=20)),
    "top-2": (Experts(count=5, top_k=2), FeedForward(width=20, is_gated=True, activation="silu")),
    "top-2, room for 3": (
        Experts(count=5, top_k=2, capacity=3, is_normalised=True),
        FeedForward(width=20, is_gated=True, activation="gelu_tanh", in_bias=False),
    ),
    "top-3, room for 1, 2 shared": (
        Experts(count=6, top_k=3, capacity=1, num_shared=2),
        FeedForward(width=12, out_bias=False),
    ),
}


def layer_of(experts: Experts, feedforward: FeedForward, width: int = 32) -> ExpertsLayer:
    """A layer with every parameter redrawn, and a router that is sharp."""
    layer = ExpertsLayer(config(width=width, experts=experts, feedforward=feedforward).layer(0))
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    layer.router.weight.data *= 3
    return layer.eval()


def random_layout(rng: np.random.Generator) -> Layout:
    return Layout.of(sorted(rng.integers(1, 16, 5)))


def slow_experts(layer: ExpertsLayer, x: torch.Tensor, layout: Layout, logits: torch.Tensor | None = None):
    """Token after token: outputs, and whether each choice was taken."""
    part = layer.config
    if logits is None:
        logits = x @ layer.router.weight.T
    outputs: list[torch.Tensor] = []
    taken: list[list[bool]] = []
    for start, length in zip(layout.starts, layout.segments):
        rows = range(start, start + length)
        probabilities = [logits[row].exp() / logits[row].exp().sum() for row in rows]
        choices = [sorted(range(part.count), key=lambda e: -float(p[e].detach()))[: part.top_k] for p in probabilities]
        load = dict.fromkeys(range(part.count), 0)
        has_room = [[False] * part.top_k for _ in rows]
        for choice in range(part.top_k):
            for i in range(length):
                expert = choices[i][choice]
                load[expert] += 1
                has_room[i][choice] = part.capacity is None or load[expert] <= part.capacity
        for i, row in enumerate(rows):
            total = sum(probabilities[i][e] for e in choices[i]) if part.is_normalised else 1.0
            y = torch.zeros_like(x[row])
            for expert, is_taken in zip(choices[i], has_room[i]):
                hidden = layer.up[expert] @ x[row]
                if layer.up_bias is not None:
                    hidden = hidden + layer.up_bias[expert]
                if layer.is_gated:
                    half = len(hidden) // 2
                    hidden = layer.activation(hidden[:half]) * hidden[half:]
                else:
                    hidden = layer.activation(hidden)
                out = layer.down[expert] @ hidden
                if layer.down_bias is not None:
                    out = out + layer.down_bias[expert]
                if is_taken:
                    y = y + out * (probabilities[i][expert] / total)
            outputs.append(y)
        taken += has_room
    y = torch.stack(outputs)
    return (y if layer.shared is None else y + layer.shared(x)), torch.tensor(taken)
