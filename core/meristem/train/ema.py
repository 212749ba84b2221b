"""A moving average of the weights in training, which evaluations use and model directories hold."""

from copy import deepcopy

import torch
from torch import nn

from meristem.model.model import Model


class MovingAverage(nn.Module):
    """A model and what is trained beside it, with averaged weights (Polyak 1992; as in Tan 2019, arXiv 1905.11946).

    A module of the task, so that a checkpoint holds it as it holds the weights. What is not trained is not copied but
    shared: a frozen trunk, a teacher.

    Args:
        decay: share of the old average that a step keeps, once enough steps are taken.
        model, extra: a model and what the objective has beside it; as they are now is where the average begins.
    """

    model: Model
    extra: nn.ModuleDict

    def __init__(self, decay: float, model: Model, extra: nn.ModuleDict):
        super().__init__()
        self.decay = decay
        fixed = {id(p): p for source in (model, extra) for p in source.parameters() if not p.requires_grad}
        self.model, self.extra = deepcopy(model, fixed), deepcopy(extra, fixed)
        self.requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay of step n (from 1): less in the beginning, so that the first weights are soon forgotten."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, extra: nn.Module, step: int) -> None:
        """Take in the weights that optimiser step `step` (from 1) has left; buffers are taken as they are."""
        for average, source in ((self.model, model), (self.extra, extra)):
            old, new = list(average.parameters()), list(source.parameters())
            moved = [(a, b) for a, b in zip(old, new, strict=True) if a is not b]
            if moved:
                averages, values = map(list, zip(*moved))
                torch._foreach_lerp_(averages, values, 1 - self.decay_at(step))
            for buffer, value in zip(average.buffers(), source.buffers(), strict=True):
                if buffer is not value:
                    buffer.copy_(value)
