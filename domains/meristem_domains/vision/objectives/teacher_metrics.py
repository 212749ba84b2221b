"""Metrics that show whether self-distillation has collapsed, over a whole evaluation.

If the teacher's output is the same for all pictures, the entropy of its mean distribution is low (`UsedEntropy`). If it
is uniform for every picture, its mean entropy is log K, the highest value (`FigureMean` of the entropies).
"""

import torch
from torchmetrics import MeanMetric, Metric


class FigureMean(MeanMetric):
    """The mean of one of the figures of the large views.

    Args:
        column: 0 for the entropy (nats) of the teacher's distribution; 1 for the divergence (nats) of the student's
            distributions from it, which is the loss minus the entropy.
    """

    def __init__(self, column: int) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(torch.float64)
        self.column = column

    def update(self, figures: torch.Tensor, distributions: torch.Tensor) -> None:  # type: ignore[override]
        super().update(figures[:, self.column].double())


class UsedEntropy(Metric):
    """The entropy (nats) of the teacher's mean distribution; log K where all prototypes are used alike.

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
