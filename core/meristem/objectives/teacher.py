"""A teacher that follows its student, and the head both end in."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from meristem.model.config import Init, TransformerConfig
from meristem.model.init import init_weights
from meristem.model.model import Model
from meristem.model.outputs import Wanted
from meristem.shapes import Float, Tensor
from meristem.types import PackedBatch


class PrototypeHead(nn.Module):
    """Three layers with GELU, then cosines with prototypes (Caron 2021, arXiv 2104.14294, appendix C).

    The last layer is weight-normalised with the norm fixed to 1.

    Args:
        hidden_width: of the first two layers.
        bottleneck_width: of the third.
        num_prototypes: scores that come out.
    """

    def __init__(self, width: int, hidden_width: int, bottleneck_width: int, num_prototypes: int, init: Init):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, bottleneck_width),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_width))
        init_weights(self, init, 1)

    def init_own_weights(self, config: Init) -> None:
        """Only directions count."""
        nn.init.normal_(self.prototypes)

    def forward(self, vectors: Float[Tensor, "S D"]) -> Float[Tensor, "S C"]:
        """Scores between -1 and 1."""
        return F.linear(F.normalize(self.layers(vectors), dim=-1), F.normalize(self.prototypes, dim=-1))


class Teacher(nn.Module):
    """The average of a student's past weights, and the centre of its own scores; no gradient reaches it.

    It is always as in evaluation. All it has learnt is in its state: weights, centre, steps taken.

    Args:
        head: makes a head for vectors of a width.
        temperatures: that scores are divided by, in the first step and after `warmup_steps`.
        warmup_steps: over which the temperature changes linearly.
        momentum: share of the weights that is kept in the first step; a cosine takes it to 1 in the last one.
        center_momentum: share of the centre that is kept in a step.
    """

    center: Tensor
    step: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        head: Callable[[int], PrototypeHead],
        temperatures: tuple[float, float],
        warmup_steps: int,
        momentum: float,
        center_momentum: float,
    ):
        super().__init__()
        self.model = Model(config)
        assert self.model.pool is not None
        self.head = head(self.model.pool.width)
        self.temperatures, self.warmup_steps = temperatures, warmup_steps
        self.first_momentum, self.center_momentum = momentum, center_momentum
        self.total_steps = 1
        # on the device, so that no step waits for the host
        self.register_buffer("center", torch.zeros(len(self.head.prototypes)))
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self._seen: tuple[Tensor, Tensor] | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """It stays as in evaluation."""
        return super().train(False)

    def _pairs(self, model: Model, head: PrototypeHead) -> Iterator[tuple[Tensor, Tensor]]:
        """Its parameters, each beside the student's."""
        for own, other in ((self.model.trunk, model.trunk), (self.model.pool, model.pool), (self.head, head)):
            yield from zip(own.parameters(), other.parameters(), strict=True)  # type: ignore[union-attr]

    @torch.no_grad()
    def begin_as(self, model: Model, head: PrototypeHead, total_steps: int) -> None:
        """Take over the student's weights, for a run of so many steps."""
        self.total_steps = max(1, total_steps)
        for own, other in self._pairs(model, head):
            own.copy_(other)

    @property
    def momentum(self) -> Tensor:
        """Share of the weights that the next step keeps."""
        done = (self.step / self.total_steps).clamp(max=1)
        return 1 - (1 - self.first_momentum) * 0.5 * (1 + torch.cos(math.pi * done))

    @property
    def temperature(self) -> Tensor:
        """That scores are divided by now."""
        first, last = self.temperatures
        return first + (last - first) * (self.step / max(1, self.warmup_steps)).clamp(max=1)

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Float[Tensor, "S C"]:
        """Scores of the sequences of a pack, in its order, as they come out of the head."""
        scores: Tensor = self.head(self.model(batch, Wanted(is_pooled=True)).pooled)
        return scores.float()

    @torch.no_grad()
    def distribution(self, scores: Float[Tensor, "N G C"]) -> Float[Tensor, "N G C"]:
        """What the student is to say: centred and sharpened (equations 1 and 4)."""
        return ((scores - self.center) / self.temperature.float()).softmax(-1)

    @torch.no_grad()
    def remember(self, scores: Float[Tensor, "N G C"]) -> None:
        """Keep scores of a pack for the centre, which moves once a step, over all of its packs and ranks."""
        rows = scores.flatten(0, -2)
        total, count = rows.double().sum(0), torch.tensor([float(len(rows))], dtype=torch.float64).to(rows.device)
        # no buffers: what a step has half done is no part of a checkpoint, and differs by rank
        self._seen = (total, count) if self._seen is None else (self._seen[0] + total, self._seen[1] + count)

    @torch.no_grad()
    def follow(self, model: Model, head: PrototypeHead, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Take a step behind the student: weights, centre, and the counter of both schedules."""
        share = 1 - self.momentum
        for own, other in self._pairs(model, head):
            own.lerp_(other.to(own.dtype), share.to(own.dtype))
        if self._seen is not None:
            seen = sum_over_processes(torch.cat(self._seen))
            self.center.lerp_((seen[:-1] / seen[-1]).to(self.center.dtype), 1 - self.center_momentum)
            self._seen = None
        self.step += 1
