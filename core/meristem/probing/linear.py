"""Linear probes: logistic regression of classes, ridge regression of values, on standardised vectors.

All in fp64: the vectors of a frozen model are few, and what is measured is the model, not the solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from meristem.shapes import Float, Int, Tensor

L2_CLASSES = tuple(10.0**power for power in range(1, -7, -1))
"""Penalties that are tried, the strongest first: times half the squared weights, beside the mean loss."""

L2_VALUES = tuple(10.0**power for power in range(4, -6, -1))
DEFAULT_L2 = 1e-2
"""Where there is no validation part to choose by."""

PATIENCE = 2
"""Weaker penalties are not tried after that many in a row have made the validation worse."""

STEPS_TO_CHOOSE, STEPS_TO_FIT = 100, 1000
"""Steps of L-BFGS at most: to compare penalties, each begun where a stronger one ended; and of the fit that counts."""

TOLERANCE_TO_CHOOSE, TOLERANCE_TO_FIT = 1e-5, 1e-8
"""Largest gradient at which it stops."""

Advance = Callable[[int], None]
"""Told of penalties as they are tried."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted map.

    Attributes:
        weights: `[D + 1, C]` the last row is the bias.
        mean: `[D]` of the training vectors.
        scale: `[D]` their deviation, 1 where it is 0.
        l2: penalty that was chosen.
        losses: of the validation part, by penalty; nan where there was none.
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
    l2: float | None = None,
    device: str = "cpu",
    advance: Advance | None = None,
) -> LinearProbe:
    """Multinomial logistic regression; the penalty with the lowest validation loss, then fitted to all.

    Args:
        vectors: `[N, D]` of training and validation.
        codes: `[N]` their classes.
        is_validation: `[N]` those that the penalty is chosen by.
        l2: the penalty, where it is not to be chosen.
        advance: called once a penalty.
    """
    known = torch.from_numpy(codes).to(device)

    def losses() -> dict[float, float]:
        x_ND, seen = _tensor(vectors, device), torch.from_numpy(~is_validation).to(device)
        mean, scale = _standard(x_ND[seen])
        x_ND = (x_ND - mean) / scale
        # a class without a record to fit on has no meaning in a loss
        counted = ~seen & torch.isin(known, known[seen])
        found: dict[float, float] = {}
        weights = None
        if not counted.any():
            return found
        for value in L2_CLASSES:
            weights = fit_logistic(
                x_ND[seen], known[seen], num_classes, value, weights, STEPS_TO_CHOOSE, TOLERANCE_TO_CHOOSE
            )
            found[value] = float(F.cross_entropy(_apply(x_ND[counted], weights), known[counted]))
            if advance is not None:
                advance(1)
            if len(found) - 1 - int(np.argmin(list(found.values()))) >= PATIENCE:
                break
        return found

    tried = losses() if l2 is None and is_validation.any() else {}
    chosen = l2 if l2 is not None else min(tried, key=lambda value: tried[value], default=DEFAULT_L2)
    x_ND = _tensor(vectors, device)
    mean, scale = _standard(x_ND)
    weights = fit_logistic((x_ND - mean) / scale, known, num_classes, chosen)
    return LinearProbe(weights, mean, scale, chosen, tried)


def probe_values(
    vectors: np.ndarray, values: np.ndarray, is_validation: np.ndarray, l2: float | None = None, device: str = "cpu"
) -> LinearProbe:
    """Ridge regression; arguments as those of `probe_classes`."""
    x_ND, y_N = _tensor(vectors, device), _tensor(values, device)
    tried: dict[float, float] = {}
    if l2 is None and is_validation.any():
        seen = torch.from_numpy(~is_validation).to(device)
        mean, scale = _standard(x_ND[seen])
        paths = fit_ridge((x_ND[seen] - mean) / scale, y_N[seen], L2_VALUES)
        held = (x_ND[~seen] - mean) / scale
        tried = {
            value: float((_apply(held, weights)[:, 0] - y_N[~seen]).square().mean())
            for value, weights in zip(L2_VALUES, paths)
        }
    chosen = l2 if l2 is not None else min(tried, key=lambda value: tried[value], default=DEFAULT_L2)
    mean, scale = _standard(x_ND)
    [weights] = fit_ridge((x_ND - mean) / scale, y_N, (chosen,))
    return LinearProbe(weights, mean, scale, chosen, tried)


def fit_logistic(
    x_ND: Float[Tensor, "N D"],
    codes_N: Int[Tensor, "N"],
    num_classes: int,
    l2: float,
    start: Float[Tensor, "D_plus_1 C"] | None = None,
    max_steps: int = STEPS_TO_FIT,
    tolerance: float = TOLERANCE_TO_FIT,
) -> Float[Tensor, "D_plus_1 C"]:
    """Minimise the mean cross entropy and `l2 / 2` times the squared weights (not the bias), by L-BFGS."""
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
    """Weights by penalty, of vectors with a mean of 0: one decomposition of the smaller Gram matrix for all."""
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
    # a feature that is constant but for rounding tells nothing, and would be blown up
    is_constant = scale <= 1e-7 * mean.abs().clamp(min=1e-30)
    return mean, torch.where(is_constant, torch.ones_like(scale), scale)


def _apply(x_ND: Float[Tensor, "N D"], weights: Float[Tensor, "D_plus_1 C"]) -> Float[Tensor, "N C"]:
    return x_ND @ weights[:-1] + weights[-1]


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float64)
