"""How evenly routers spread their tokens, over a whole evaluation: fed by `routing_figures`."""

from collections.abc import Callable

import torch
from torchmetrics import Metric

from meristem.model.config import TransformerConfig
from meristem.objectives.routing import FIGURES, expert_layers
from meristem.shapes import Float, Tensor


class RouterMetric(Metric):
    """A figure of what `routing_figures` gives, added up for each expert layer and expert.

    Args:
        figure: of those sums: choices, dropped choices and probability of each expert, and tokens of each layer.
        num_layers: expert layers.
        num_experts: of the layer that has most.
    """

    spread: Tensor
    tokens: Tensor

    def __init__(self, figure: Callable[[Tensor, Tensor], Tensor], num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.figure = figure
        self.add_state("spread", torch.zeros(num_layers, num_experts, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, spread: Tensor, tokens: Tensor) -> None:
        self.spread += spread
        self.tokens += tokens

    def compute(self) -> Tensor:
        return self.figure(self.spread, self.tokens)


def busiest_frac(spread: Float[Tensor, "L X 3"], tokens: Float[Tensor, "L"]) -> Tensor:
    """The share of choices that fall on the busiest expert of a layer, mean over layers; 1 / X where load is even."""
    choices_LX = spread[..., 0]
    return (choices_LX.amax(1) / choices_LX.sum(1)).mean()


def router_entropy(spread: Float[Tensor, "L X 3"], tokens: Float[Tensor, "L"]) -> Tensor:
    """The entropy (nats) of a layer's mean router distribution, mean over layers; log X where load is even."""
    return torch.special.entr(spread[..., 2] / tokens[:, None]).sum(1).mean()


def dropped_frac(spread: Float[Tensor, "L X 3"], tokens: Float[Tensor, "L"]) -> Tensor:
    """The share of choices that no expert had room for, over all layers."""
    return spread[..., 1].sum() / spread[..., 0].sum()


def router_metrics(config: TransformerConfig) -> dict[str, Metric]:
    """Metrics of the routers of a model, by name; none without expert layers."""
    layers = expert_layers(config)
    if not layers:
        return {}
    num_experts = max(experts.count for i in layers if (experts := config.layer(i).experts) is not None)
    figures = {"busiest_frac": busiest_frac, "entropy": router_entropy, "dropped_frac": dropped_frac}
    return {f"{FIGURES}/{name}": RouterMetric(figure, len(layers), num_experts) for name, figure in figures.items()}
