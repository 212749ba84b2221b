"""Cross-entropy of a linear map onto many classes, and its gradient, in one pass over the logits.

Torch's own keeps the logits, their softmax and the gradient of both, each `[M, C]`: with a large vocabulary that is
most of a step's memory. Here the gradient is made with the loss, where the logits stood, and of few rows at once
(as Hsu 2024, arXiv 2410.10989, does on a GPU): on a CPU a part that fits into its cache at a time, on a GPU in a kernel
of its own.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from meristem.model.compiler import compiles_for_gpu
from meristem.shapes import Bool, Float, Int, Tensor

MAX_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Logits that are worth another part; a part holds twice as many at most. Of fewer rows than a thousand products would
be slow."""

CACHED_LOGITS = 2**19
"""Logits of a part on a CPU: 2 MB."""

FUSED_LOGITS = 2**22
"""Logits that are worth a kernel of their own on a GPU, which is compiled when it is first needed."""

CLASS_MULTIPLE = 64
"""To which classes are filled up on a GPU, as GPT-2's 50,257 are not: the fast products in half precision ask for rows
of logits that begin at a multiple of 16 bytes."""


def linear_cross_entropy(
    rows: Float[Tensor, "M D"],
    weight: Float[Tensor, "C D"],
    bias: Float[Tensor, "C"] | None,
    targets: Int[Tensor, "M"],
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "M"], Bool[Tensor, "M"]]:
    """Cross-entropy of a linear map of `rows` onto classes: `total`, `nats` and `is_hit` as in `SymbolLoss`.

    Logits are fp32 whatever precision the product has. Smoothing is as in `HeadRequest`.
    """
    return _LinearCrossEntropy.apply(rows, weight, bias, targets, label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, and scaled when its own is known."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        is_trained = any(ctx.needs_input_grad[:3])
        losses, row_grads = [], []
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        num_classes = len(weight)
        num_spare = -num_classes % CLASS_MULTIPLE if rows.is_cuda else 0
        is_worth_it = is_trained and rows.is_cuda and len(rows) * num_classes >= FUSED_LOGITS
        plain = partial(_differentiate, is_trained=is_trained)
        differentiate = _differentiate_in_kernel if is_worth_it and compiles_for_gpu() else plain
        with torch.autocast(kind, enabled=False):
            map_PD, shift_P = weight.to(dtype), None if bias is None else bias.to(dtype)
            if num_spare:
                map_PD = F.pad(map_PD, (0, 0, 0, num_spare))
                shift_P = None if shift_P is None else F.pad(shift_P, (0, num_spare))
            num_parts = max(1, len(rows) * len(map_PD) // MAX_LOGITS.get(kind, MAX_LOGITS["cpu"]))
            num_rows = max(1, -(-len(rows) // num_parts))
            for part_mD, wanted_m in zip(rows.to(dtype).split(num_rows), targets.split(num_rows)):
                logits_mP = F.linear(part_mD, map_PD, shift_P)
                *found, grad_mP = differentiate(logits_mP, wanted_m, num_classes, smoothing)
                losses.append(found)
                if not is_trained:
                    continue
                row_grads.append(grad_mP @ map_PD)
                weight_grad = _added(weight_grad, (grad_mP.t() @ part_mD)[:num_classes].to(weight.dtype))
                if bias is not None:
                    more_C = grad_mP.sum(0, dtype=torch.float32)[:num_classes].to(bias.dtype)
                    bias_grad = _added(bias_grad, more_C)
        ctx.has_bias = bias is not None
        if is_trained:
            grads = [torch.cat(row_grads).to(rows.dtype), weight_grad, bias_grad]
            ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        losses_M, nats_M, is_hit_M = map(torch.cat, zip(*losses))
        ctx.mark_non_differentiable(nats_M, is_hit_M)
        return losses_M.sum(), nats_M, is_hit_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # in place: torch refuses a second pass over what was saved and then changed
        scaled = [saved.mul_(grads[0]) for saved in ctx.saved_tensors]
        return (*scaled, *([] if ctx.has_bias else [None]), None, None)


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


Differentiated = tuple[Float[Tensor, "m"], Float[Tensor, "m"], Bool[Tensor, "m"], Float[Tensor, "m P"]]
"""Losses, nats, hits, and the gradient of the sum of the losses by each logit."""


def _differentiate_in_kernel(
    logits_mP: Float[Tensor, "m P"], wanted_m: Int[Tensor, "m"], num_classes: int, smoothing: float
) -> Differentiated:
    from meristem.model.heads.cross_entropy_kernel import differentiate_rows

    return *differentiate_rows(logits_mP, wanted_m, num_classes, smoothing), logits_mP


def _differentiate(
    logits_mP: Float[Tensor, "m P"],
    wanted_m: Int[Tensor, "m"],
    num_classes: int,
    smoothing: float,
    is_trained: bool,
) -> Differentiated:
    """By torch alone, in place; logits behind the first `num_classes` are spare."""
    logits_mC = logits_mP[:, :num_classes].float()
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
    grad_mC, num_spare = logits_mC.to(logits_mP.dtype), logits_mP.shape[1] - num_classes
    return torch.cat(losses), torch.cat(nats), torch.cat(hits), F.pad(grad_mC, (0, num_spare)) if num_spare else grad_mC
