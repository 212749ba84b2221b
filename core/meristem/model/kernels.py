"""How packed attention is computed: the only place that knows.

One signature, `attend`; three ways: variable-length flash attention on CUDA in half precision, one SDPA call per
group of equal lengths elsewhere, and `attend_reference`, slow and obvious, the oracle of the tests and the source
of attention maps.

Measured on two CPU cores, 8 sequences of 256 tokens, 8 heads of 32: grouped 5 ms, compiled FlexAttention 11 ms,
one masked call 42 ms, jagged nested tensors 144 ms. Grouping pads nothing, and the result of a sequence
does not depend on the group it is computed in.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from meristem.model.config import Causal, Full, Pattern
from meristem.model.patterns import visible
from meristem.shapes import Float, Tensor
from meristem.types import Layout

try:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no window_size yet; causal attention is said by one from 2.12 on
    VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN_ARGUMENTS = frozenset()


CPU_MIN_QUERIES = 33
"""Queries that a sequence is given at least when vectors are made on a CPU; the spare ones are not read.

SDPA cuts queries into blocks of 32 and gives each thread a buffer whose size, for fewer queries, depends on their
number: then the second thread's buffer is not aligned, the products in it round otherwise, and a vector depends on
which thread its sequence falls to (seen at head widths 6, 8 and 10 and odd lengths below 32). One block alone
runs outside of the threads and rounds otherwise as well; 33 queries are two."""


def attend(
    q_THE: Float[Tensor, "T H E"],
    k_UKE: Float[Tensor, "U K E"],
    v_UKE: Float[Tensor, "U K E"],
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H E"]:
    """Scaled dot-product attention within each sequence: self, cross and cached alike.

    Args:
        q_layout: of the queries.
        kv_layout: of keys and values; sequence i of the queries sees sequence i of the keys, and spare rows
            see spare rows.
        pattern: which keys a query may see within its sequence.
        scale: of the scores; 1 / sqrt(E) when None.
        dropout: of the weights.
    """
    if _varlen_fits(q_THE, pattern, dropout):
        return _attend_varlen(q_THE, k_UKE, v_UKE, q_layout, kv_layout, pattern, scale)
    return _attend_grouped(q_THE, k_UKE, v_UKE, q_layout, kv_layout, pattern, scale, dropout)


def attend_reference(
    q_THE: Float[Tensor, "T H E"],
    k_UKE: Float[Tensor, "U K E"],
    v_UKE: Float[Tensor, "U K E"],
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    scale: float | None = None,
) -> tuple[Float[Tensor, "T H E"], list[Float[Tensor, "H m n"]]]:
    """The oracle: one sequence at a time, dense scores, a mask, a softmax.

    Returns:
        The output, and the attention weights of each sequence.
    """
    share = q_THE.shape[1] // k_UKE.shape[1]
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    outputs, weights = [], []
    rows = zip(q_layout.starts, q_layout.segments, kv_layout.starts, kv_layout.segments, strict=True)
    for q_start, q_length, kv_start, kv_length in rows:
        q_mHE = q_THE[q_start : q_start + q_length]
        k_nHE = k_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        v_nHE = v_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        scores_Hmn = torch.einsum("mhe,nhe->hmn", q_mHE, k_nHE) * scale
        i = torch.arange(kv_length - q_length, kv_length, device=q_THE.device)[:, None]
        j = torch.arange(kv_length, device=q_THE.device)[None, :]
        weights_Hmn = scores_Hmn.masked_fill(~visible(pattern, i, j), -torch.inf).softmax(-1)
        weights.append(weights_Hmn)
        outputs.append(torch.einsum("hmn,nhe->mhe", weights_Hmn, v_nHE))
    return torch.cat(outputs), weights[: q_layout.num_sequences]


def _attend_grouped(
    q_THE: Tensor,
    k_UKE: Tensor,
    v_UKE: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """One SDPA call for all sequences of equal lengths; packs that are sorted by length are not copied.

    Rows are split once and joined once: the gradient of a slice would be a tensor of all rows, and that for
    each group.
    """
    num_heads, num_kv_heads, head_width = q_THE.shape[1], k_UKE.shape[1], q_THE.shape[2]
    plan = _plan(q_layout.segments, kv_layout.segments)
    q_groups = _split(q_THE, plan.q_order, plan.q_rows)
    k_groups, v_groups = (_split(x_UKE, plan.kv_order, plan.kv_rows) for x_UKE in (k_UKE, v_UKE))
    outputs = []
    for (q_length, kv_length, count), q, k, v in zip(plan.groups, q_groups, k_groups, v_groups, strict=True):
        if not q_length or not kv_length:  # spare rows of one side that face none of the other
            outputs.append(torch.zeros_like(q))
            continue
        mask = None
        if isinstance(pattern, Causal) and q_length != kv_length:
            i = torch.arange(kv_length - q_length, kv_length, device=q.device)[:, None]
            mask = visible(pattern, i, torch.arange(kv_length, device=q.device)[None, :])
        q_GHmE = q.view(count, q_length, num_heads, head_width).transpose(1, 2)
        if q_length < CPU_MIN_QUERIES and mask is None and q.is_cpu and not torch.is_grad_enabled():
            q_GHmE = F.pad(q_GHmE, (0, 0, 0, CPU_MIN_QUERIES - q_length))
        o_GHmE = F.scaled_dot_product_attention(
            q_GHmE,
            k.view(count, kv_length, num_kv_heads, head_width).transpose(1, 2),
            v.view(count, kv_length, num_kv_heads, head_width).transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            scale=scale,
            is_causal=isinstance(pattern, Causal) and mask is None,
            enable_gqa=num_heads != num_kv_heads,
        )
        outputs.append(o_GHmE[:, :, :q_length].transpose(1, 2).reshape(-1, num_heads, head_width))
    o_THE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.q_order is None:
        return o_THE
    return torch.empty_like(o_THE).index_copy(0, torch.from_numpy(plan.q_order).to(o_THE.device), o_THE)


@dataclass(frozen=True)
class _Plan:
    """Groups of sequences of equal lengths.

    Attributes:
        groups: query length, key length and number of sequences of each group.
        q_rows, kv_rows: rows of each group.
        q_order, kv_order: rows in the order of the groups; None where they stand so already.
    """

    groups: tuple[tuple[int, int, int], ...]
    q_rows: list[int]
    kv_rows: list[int]
    q_order: np.ndarray | None
    kv_order: np.ndarray | None


@lru_cache(maxsize=16)
def _plan(q_segments: tuple[int, ...], kv_segments: tuple[int, ...]) -> _Plan:
    """Group the sequences of a batch; every layer asks again for the same one."""
    assert len(q_segments) == len(kv_segments), "each sequence of queries faces one of keys"
    by_lengths: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, lengths in enumerate(zip(q_segments, kv_segments)):
        by_lengths[lengths].append(index)
    groups = tuple((q, kv, len(members)) for (q, kv), members in by_lengths.items())
    order = [index for members in by_lengths.values() for index in members]

    def rows_in(segments: tuple[int, ...]) -> np.ndarray | None:
        if order == sorted(order):
            return None
        starts = np.concatenate([[0], np.cumsum(segments)])
        return np.concatenate([np.arange(starts[index], starts[index + 1]) for index in order])

    return _Plan(
        groups=groups,
        q_rows=[q * count for q, _, count in groups],
        kv_rows=[kv * count for _, kv, count in groups],
        q_order=rows_in(q_segments),
        kv_order=rows_in(kv_segments),
    )


def _split(x_THE: Tensor, order: np.ndarray | None, rows: list[int]) -> Sequence[Tensor]:
    """The rows of each group."""
    if order is not None:
        x_THE = x_THE.index_select(0, torch.from_numpy(order).to(x_THE.device))
    return x_THE.split(rows)


def _varlen_fits(q_THE: Tensor, pattern: Pattern, dropout: float) -> bool:
    """Whether the variable-length kernel computes this: CUDA, half precision, a pattern that it knows."""
    knows_pattern = isinstance(pattern, Full) or (
        isinstance(pattern, Causal) and bool(VARLEN_ARGUMENTS & {"window_size", "is_causal"})
    )
    is_half = q_THE.dtype in (torch.bfloat16, torch.float16)
    return q_THE.is_cuda and is_half and knows_pattern and dropout == 0.0 and bool(VARLEN_ARGUMENTS)


def _attend_varlen(
    q_THE: Tensor,
    k_UKE: Tensor,
    v_UKE: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    scale: float | None,
) -> Tensor:
    options: dict[str, Any] = {}
    if isinstance(pattern, Causal):
        options = {"window_size": (-1, 0)} if "window_size" in VARLEN_ARGUMENTS else {"is_causal": True}
    if q_THE.shape[1] != k_UKE.shape[1]:
        if "enable_gqa" in VARLEN_ARGUMENTS:
            options["enable_gqa"] = True
        else:
            share = q_THE.shape[1] // k_UKE.shape[1]
            k_UKE, v_UKE = k_UKE.repeat_interleave(share, 1), v_UKE.repeat_interleave(share, 1)
    if scale is not None:
        options["scale"] = scale
    o_THE = varlen_attn(
        q_THE,
        k_UKE,
        v_UKE,
        q_layout.cu_seqlens,
        kv_layout.cu_seqlens,
        q_layout.max_length,
        kv_layout.max_length,
        **options,
    )
    assert isinstance(o_THE, Tensor)  # not asked for more
    return o_THE
