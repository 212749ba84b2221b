"""Cross-entropy of a linear map onto many classes, and its gradient, in one pass over the logits.

Torch's own keeps the logits, their softmax and the gradient of both, each `[M, C]`: with a large vocabulary that is
most of a step's memory. Here the gradient is made where the logits stood, a part that fits into a CPU's cache at a
time, and no more rows at once than `MAX_LOGITS` allows (as Hsu 2024, arXiv 2410.10989, does on a GPU).
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from meristem.shapes import Bool, Float, Int, Tensor

MAX_LOGITS = 2**26
"""Logits that are held at once; fewer rows than a thousand would make slow products."""

CACHED_LOGITS = 2**19
"""Logits of a part on a CPU: 2 MB."""


class CrossEntropy(NamedTuple):
    """What was asked of each row, and how well it was said.

    Attributes:
        total: sum of the losses (nats), with gradient.
        nats: of each row, without smoothing and without gradient.
        is_hit: the target is the likeliest class.
    """

    total: Float[Tensor, ""]
    nats: Float[Tensor, "M"]
    is_hit: Bool[Tensor, "M"]


def linear_cross_entropy(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "C D"],
    bias: Float[Tensor, "C"] | None,
    targets: Int[Tensor, "M"],
    label_smoothing: float = 0.0,
) -> CrossEntropy:
    """Of `rows` mapped onto classes; logits are fp32 whatever the product is taken in.

    Args:
        targets: classes, all known.
        label_smoothing: share of each target's probability that is spread evenly over all classes.
    """
    return CrossEntropy(*_LinearCrossEntropy.apply(rows, weight, bias, targets, label_smoothing))


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, and scaled when its own is known."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        is_trained = any(ctx.needs_input_grad[:3])
        losses: list[Tensor] = []
        nats: list[Tensor] = []
        hits: list[Tensor] = []
        row_grads = []
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        with torch.autocast(kind, enabled=False):
            map_CD, shift_C = weight.to(dtype), None if bias is None else bias.to(dtype)
            num_rows = max(1, MAX_LOGITS // len(weight))
            for part_mD, wanted_m in zip(rows.to(dtype).split(num_rows), targets.split(num_rows)):
                logits_mC = F.linear(part_mD, map_CD, shift_C).float()
                found = _differentiate(logits_mC, wanted_m, smoothing, is_trained)
                for values, more in zip((losses, nats, hits), found):
                    values.append(more)
                if not is_trained:
                    continue
                grad_mC = logits_mC.to(dtype)
                row_grads.append(grad_mC @ map_CD)
                weight_grad = _added(weight_grad, (grad_mC.t() @ part_mD).to(weight.dtype))
                if bias is not None:
                    bias_grad = _added(bias_grad, logits_mC.sum(0).to(bias.dtype))
        ctx.has_bias = bias is not None
        if is_trained:
            grads = [torch.cat(row_grads).to(rows.dtype), weight_grad, bias_grad]
            ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        nats_M, is_hit_M = torch.cat(nats), torch.cat(hits)
        ctx.mark_non_differentiable(nats_M, is_hit_M)
        return torch.cat(losses).sum(), nats_M, is_hit_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # in place: torch refuses a second pass over what was saved and then changed
        scaled = [saved.mul_(grads[0]) for saved in ctx.saved_tensors]
        return (*scaled, *([] if ctx.has_bias else [None]), None, None)


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _differentiate(
    logits_mC: Tensor, wanted_m: Tensor, smoothing: float, is_trained: bool
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"], Bool[Tensor, "m"]]:
    """Losses, nats and hits; the logits become the gradient of the sum of the losses."""
    num_classes = logits_mC.shape[1]
    step = max(1, CACHED_LOGITS // num_classes) if logits_mC.is_cpu else max(1, len(logits_mC))
    losses, nats, hits = [], [], []
    for part_kC, wanted_k in zip(logits_mC.split(step), wanted_m.split(step)):
        place_k1 = wanted_k[:, None]
        asked_k1, highest_k1 = part_kC.gather(1, place_k1), part_kC.amax(1, keepdim=True)
        # what training does not look at may count ties
        hits.append((asked_k1 >= highest_k1)[:, 0] if is_trained else part_kC.argmax(1) == wanted_k)
        mean_k = part_kC.mean(1) if smoothing else None
        sums_k1 = part_kC.sub_(highest_k1).exp_().sum(1, keepdim=True)
        log_sums_k1 = sums_k1.log() + highest_k1
        nats.append((log_sums_k1 - asked_k1)[:, 0])
        losses.append(nats[-1] if mean_k is None else nats[-1].lerp(log_sums_k1[:, 0] - mean_k, smoothing))
        if is_trained:
            part_kC.div_(sums_k1)
            if smoothing:
                part_kC.sub_(smoothing / num_classes)
            part_kC.scatter_(1, place_k1, part_kC.gather(1, place_k1) - (1 - smoothing))
    return torch.cat(losses), torch.cat(nats), torch.cat(hits)
