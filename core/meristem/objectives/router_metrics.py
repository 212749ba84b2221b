"""How evenly routers spread their tokens, over a whole evaluation: fed by `routing_figures`."""

from collections.abc import Callable

import torch
from torchmetrics import Metric

from meristem.model.config import TransformerConfig
from meristem.objectives.routing import FIGURES, expert_layers


class RouterMetric(Metric):
    """Adds up, for each expert layer and expert, what `routing_figures` gives; subclasses say what they read in it.

    Args:
        num_layers: expert layers.
        num_experts: of the layer that has most.
    """

    spread: torch.Tensor
    tokens: torch.Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.add_state("spread", torch.zeros(num_layers, num_experts, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, spread: torch.Tensor, tokens: torch.Tensor) -> None:
        self.spread += spread
        self.tokens += tokens


class BusiestFrac(RouterMetric):
    """The share of choices that fall on the busiest expert of a layer, mean over layers; 1 / X where load is even."""

    def compute(self) -> torch.Tensor:
        choices_LX = self.spread[..., 0]
        return (choices_LX.amax(1) / choices_LX.sum(1)).mean()


class RouterEntropy(RouterMetric):
    """The entropy (nats) of a layer's mean router distribution, mean over layers; log X where load is even."""

    def compute(self) -> torch.Tensor:
        mean_LX = self.spread[..., 2] / self.tokens[:, None]
        return torch.special.entr(mean_LX).sum(1).mean()


class DroppedFrac(RouterMetric):
    """The share of choices that no expert had room for, over all layers."""

    def compute(self) -> torch.Tensor:
        return self.spread[..., 1].sum() / self.spread[..., 0].sum()


def router_metrics(config: TransformerConfig) -> dict[str, Metric]:
    """Metrics of the routers of a model, by name; none without expert layers."""
    layers = expert_layers(config)
    if not layers:
        return {}
    num_experts = max(experts.count for i in layers if (experts := config.layer(i).experts) is not None)
    kinds: dict[str, Callable[[int, int], Metric]]
    kinds = {"busiest_frac": BusiestFrac, "entropy": RouterEntropy, "dropped_frac": DroppedFrac}
    return {f"{FIGURES}/{name}": kind(len(layers), num_experts) for name, kind in kinds.items()}
