"""Linear probes: logistic regression of classes and ridge regression of values, on standardised vectors.

Everything is computed in fp64: there are few vectors, and the probe measures the model, not the solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from meristem.shapes import Float, Int, Tensor

L2_CLASSES = tuple(10.0**power for power in range(1, -7, -1))
"""Penalties that are tried, the strongest first: factors of half the sum of squared weights, added to the mean loss."""

L2_VALUES = tuple(10.0**power for power in range(4, -6, -1))
DEFAULT_L2 = 1e-2
"""The penalty where there is no validation part to choose by."""

PATIENCE = 2
"""The search ends after this many penalties in a row that did not improve the validation loss."""

STEPS_TO_CHOOSE, STEPS_TO_FIT = 100, 1000
"""Most steps of L-BFGS: while penalties are compared, each starting from the fit before, and in the last fit."""

TOLERANCE_TO_CHOOSE, TOLERANCE_TO_FIT = 1e-5, 1e-8
"""L-BFGS stops when no component of the gradient is larger."""

Advance = Callable[[int], None]
"""Called with the number of penalties that have been tried since the last call."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear map from vectors to logits or values.

    Attributes:
        weights: `[D + 1, C]`; the last row is the bias.
        mean: `[D]` of the training vectors.
        scale: `[D]` standard deviations of the training vectors, 1 where it is 0.
        l2: the penalty that was chosen.
        losses: the validation loss by penalty; empty without a validation part.
    """

    weights: Float[Tensor, "D_plus_1 C"]
    mean: Float[Tensor, "D"]
    scale: Float[Tensor, "D"]
    l2: float
    losses: dict[float, float]

    def outputs(self, vectors: np.ndarray) -> np.ndarray:
        """`[N, C]` logits of the classes, or `[N, 1]` values."""
        x_ND = (_tensor(vectors, self.weights.device) - self.mean) / self.scale
        return _apply(x_ND, self.weights).cpu().numpy()


def probe_classes(
    vectors: np.ndarray,
    codes: np.ndarray,
    num_classes: int,
    is_validation: np.ndarray,
    device: str = "cpu",
    advance: Advance = lambda count: None,
) -> LinearProbe:
    """Multinomial logistic regression, fitted to all records with the penalty that has the lowest validation loss.

    Args:
        vectors: `[N, D]` of training and validation records.
        codes: `[N]` their classes.
        is_validation: `[N]` the records that the penalty is chosen by; without any it is `DEFAULT_L2`.
        advance: called after each penalty.
    """
    x_ND, codes_N = _tensor(vectors, device), torch.from_numpy(codes).to(device)
    seen_N = torch.from_numpy(~is_validation).to(device)
    # a class without a record to fit on has no meaning in a loss
    held_N = ~seen_N & torch.isin(codes_N, codes_N[seen_N])
    losses: dict[float, float] = {}
    if held_N.any():
        mean, scale = _standard(x_ND[seen_N])
        z_ND, weights = (x_ND - mean) / scale, None
        for l2 in L2_CLASSES:
            weights = fit_logistic(
                z_ND[seen_N], codes_N[seen_N], num_classes, l2, weights, STEPS_TO_CHOOSE, TOLERANCE_TO_CHOOSE
            )
            losses[l2] = float(F.cross_entropy(_apply(z_ND[held_N], weights), codes_N[held_N]))
            advance(1)
            if len(losses) - 1 - int(np.argmin(list(losses.values()))) >= PATIENCE:
                break
    chosen = min(losses, key=losses.__getitem__, default=DEFAULT_L2)
    mean, scale = _standard(x_ND)
    weights = fit_logistic((x_ND - mean) / scale, codes_N, num_classes, chosen)
    return LinearProbe(weights, mean, scale, chosen, losses)


def probe_values(
    vectors: np.ndarray, values: np.ndarray, is_validation: np.ndarray, device: str = "cpu"
) -> LinearProbe:
    """Ridge regression of `values`, `[N]`; the other arguments are those of `probe_classes`."""
    x_ND, y_N = _tensor(vectors, device), _tensor(values, device)
    losses: dict[float, float] = {}
    if is_validation.any():
        seen_N = torch.from_numpy(~is_validation).to(device)
        mean, scale = _standard(x_ND[seen_N])
        held_ND = (x_ND[~seen_N] - mean) / scale
        for l2, weights in zip(L2_VALUES, fit_ridge((x_ND[seen_N] - mean) / scale, y_N[seen_N], L2_VALUES)):
            losses[l2] = float((_apply(held_ND, weights)[:, 0] - y_N[~seen_N]).square().mean())
    chosen = min(losses, key=losses.__getitem__, default=DEFAULT_L2)
    mean, scale = _standard(x_ND)
    [weights] = fit_ridge((x_ND - mean) / scale, y_N, (chosen,))
    return LinearProbe(weights, mean, scale, chosen, losses)


def fit_logistic(
    x_ND: Float[Tensor, "N D"],
    codes_N: Int[Tensor, "N"],
    num_classes: int,
    l2: float,
    start: Float[Tensor, "D_plus_1 C"] | None = None,
    max_steps: int = STEPS_TO_FIT,
    tolerance: float = TOLERANCE_TO_FIT,
) -> Float[Tensor, "D_plus_1 C"]:
    """Minimise the mean cross entropy plus `l2 / 2` times the sum of squared weights, without the bias, by L-BFGS."""
    shape = (x_ND.shape[1] + 1, num_classes)
    weights = x_ND.new_zeros(shape) if start is None else start.detach().clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=max_steps,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_apply(x_ND, weights), codes_N) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def fit_ridge(
    x_ND: Float[Tensor, "N D"], y_N: Float[Tensor, "N"], penalties: tuple[float, ...]
) -> list[Float[Tensor, "D_plus_1 1"]]:
    """Ridge regression weights for each penalty, from one decomposition of the smaller Gram matrix.

    The features must have a mean of 0.
    """
    count, width = x_ND.shape
    bias, centred = y_N.mean(), y_N - y_N.mean()
    is_wide = width > count
    gram = (x_ND @ x_ND.T if is_wide else x_ND.T @ x_ND) / count
    values, basis = torch.linalg.eigh(gram)
    target = basis.T @ (centred if is_wide else x_ND.T @ centred) / count
    found = []
    for l2 in penalties:
        inner = basis @ (target / (values.clamp(min=0) + l2))
        slope = x_ND.T @ inner if is_wide else inner
        found.append(torch.cat([slope, bias[None]])[:, None])
    return found


def _standard(x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    mean, scale = x_ND.mean(0), x_ND.std(0, correction=0)
    # dividing by the deviation of a feature that is constant would magnify its rounding errors
    is_constant = scale <= 1e-7 * mean.abs().clamp(min=1e-30)
    return mean, torch.where(is_constant, torch.ones_like(scale), scale)


def _apply(x_ND: Float[Tensor, "N D"], weights: Float[Tensor, "D_plus_1 C"]) -> Float[Tensor, "N C"]:
    return x_ND @ weights[:-1] + weights[-1]


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float64)
