"""Figures that show whether self-distillation has collapsed, over a whole evaluation.

A teacher that says one thing of all pictures has a low entropy over all of them together (`UsedEntropy`); one that says
nothing of any has the highest entropy there is of each (`TeacherEntropy`), log K.
"""

import torch
from torchmetrics import Metric


class _MeanColumn(Metric):
    """The mean of one column of the figures of large views."""

    column: int
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: torch.Tensor, distributions: torch.Tensor) -> None:
        self.total += figures[:, self.column].double().sum()
        self.count += len(figures)

    def compute(self) -> torch.Tensor:
        return self.total / self.count


class TeacherEntropy(_MeanColumn):
    """The entropy (nats) of what the teacher says of a view."""

    column = 0


class ViewGap(_MeanColumn):
    """How far the student is from that: the mean divergence (nats) over other views, the loss less the entropy."""

    column = 1


class UsedEntropy(Metric):
    """The entropy (nats) of the mean of what the teacher says; log K where all prototypes are used alike.

    Args:
        num_prototypes: K.
    """

    total: torch.Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_prototypes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: torch.Tensor, distributions: torch.Tensor) -> None:
        self.total += distributions.double().sum(0)

    def compute(self) -> torch.Tensor:
        return torch.special.entr(self.total / self.total.sum()).sum()
