"""The kernels of attention with all that they are given side by side, for tests."""

from collections.abc import Sequence

from meristem.model import kernels
from meristem.model.config import Pattern
from meristem.model.kernels import Packed, Scoring, Slotted
from meristem.shapes import Tensor
from meristem.types import Layout


def attend(q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, pattern: Pattern, *more) -> Tensor:
    return kernels.attend(Packed(q, k, v, q_layout, kv_layout), Scoring(pattern, *more))


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, pattern: Pattern, *more
) -> tuple[Tensor, list[Tensor]]:
    return kernels.attend_reference(Packed(q, k, v, q_layout, kv_layout), Scoring(pattern, *more))


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_lengths: Sequence[int], pattern: Pattern, *more, slots=None
) -> Tensor:
    order = list(range(len(kv_lengths))) if slots is None else slots
    return kernels.attend_cached(Slotted(q, k, v, q_layout, tuple(kv_lengths), order), Scoring(pattern, *more))
