"""The kernels of attention with all that they are given side by side, for tests."""

from meristem.model import kernels
from meristem.model.config import Pattern
from meristem.model.kernels import Packed, Scoring
from meristem.shapes import Tensor
from meristem.types import Layout


def attend(q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, pattern: Pattern, *more) -> Tensor:
    return kernels.attend(Packed(q, k, v, q_layout, kv_layout), Scoring(pattern, *more))


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, pattern: Pattern, *more
) -> tuple[Tensor, list[Tensor]]:
    return kernels.attend_reference(Packed(q, k, v, q_layout, kv_layout), Scoring(pattern, *more))


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_lengths: list[int], pattern: Pattern, *more, **slots
) -> Tensor:
    return kernels.attend_cached(q, k, v, q_layout, kv_lengths, Scoring(pattern, *more), **slots)
