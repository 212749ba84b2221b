"""The loss and its gradient of rows of logits in one kernel, for a GPU: logits are read twice and written once.

One program a row: the largest logit and the sum of exponentials on the way there (Milakov 2018, arXiv 1805.02867), the
gradient where the logits stood on the way back. Imported where it is needed, since it needs Triton.
"""

import torch
import triton
import triton.language as tl

from meristem.shapes import Bool, Float, Int, Tensor

BLOCK = 8192
"""Logits that a program holds at once."""


def differentiate_rows(
    logits_mP: Float[Tensor, "m P"], wanted_m: Int[Tensor, "m"], num_classes: int, smoothing: float
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"], Bool[Tensor, "m"]]:
    """Losses, nats and hits; the logits become the gradient of the sum of the losses, 0 where they are spare.

    Args:
        logits_mP: rows end to end; of any precision, and those behind the first `num_classes` are spare.
    """
    assert logits_mP.is_contiguous()
    losses_m, nats_m = (torch.empty(len(logits_mP), device=logits_mP.device) for _ in range(2))
    is_hit_m = torch.empty(len(logits_mP), dtype=torch.bool, device=logits_mP.device)
    width = logits_mP.shape[1]
    block = min(BLOCK, triton.next_power_of_2(width))
    if len(logits_mP):
        _differentiate_row[(len(logits_mP),)](
            logits_mP, wanted_m, losses_m, nats_m, is_hit_m, width, num_classes, smoothing, block, num_warps=16
        )
    return losses_m, nats_m, is_hit_m


@triton.jit
def _differentiate_row(  # type: ignore[no-untyped-def] # Triton takes no types of Python
    logits, wanted, losses, nats, hits, width, num_classes, smoothing, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * width
    place = tl.load(wanted + row)
    asked = tl.load(own + place).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    plain_sum = 0.0
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        is_class = column < num_classes
        # spare logits are loaded and left out: bounds at a multiple of 16 make wide loads
        x = tl.load(own + column, mask=column < width, other=float("-inf")).to(tl.float32)
        x = tl.where(is_class, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        plain_sum += tl.sum(tl.where(is_class, x, 0.0), 0)
        highest = higher
    log_total = tl.log(total) + highest
    tl.store(nats + row, log_total - asked)
    tl.store(losses + row, log_total - (1 - smoothing) * asked - smoothing * plain_sum / num_classes)
    tl.store(hits + row, asked >= highest)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        is_class = column < num_classes
        x = tl.load(own + column, mask=column < width, other=float("-inf")).to(tl.float32)
        odds = tl.where(is_class, tl.exp(x - log_total), 0.0)
        aimed = tl.where(is_class, smoothing / num_classes, 0.0) + tl.where(column == place, 1 - smoothing, 0.0)
        tl.store(own + column, (odds - aimed).to(logits.dtype.element_ty), mask=column < width)
