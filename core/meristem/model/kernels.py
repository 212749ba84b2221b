"""How packed attention is computed: the only place that knows.

One signature, `attend`. On CUDA: variable-length flash attention in half precision for what is a window, SDPA where
all sequences are equally long, FlexAttention for other patterns and for score biases. Elsewhere: one SDPA call per
group of equal lengths, masked where the pattern asks for it, and on tiles where a long sequence sees little of itself.
`attend_reference`, slow and obvious, is the oracle of the tests and the source of attention maps. Keys and values that
are kept have a kernel in `cached.py`.

Measured on two CPU cores, 8 sequences of 256 tokens, 8 heads of 32: grouped 5 ms, compiled FlexAttention 11 ms,
one masked call 42 ms, jagged nested tensors 144 ms.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from meristem.model import exact
from meristem.model.config import Causal, Full, Pattern
from meristem.model.flex import attend_flex, flex_fits
from meristem.model.patterns import has_prefix, visible
from meristem.model.position import ScoreBias
from meristem.model.tiles import attend_tiles, plan_tiles
from meristem.model.varlen import attend_varlen, varlen_fits
from meristem.shapes import Bool, Float, Tensor
from meristem.types import Layout


def attend(
    q_THE: Float[Tensor, "T H E"],
    k_UKE: Float[Tensor, "U K E"],
    v_UKE: Float[Tensor, "U K E"],
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    bias: ScoreBias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H E"]:
    """Scaled dot-product attention within each sequence, self and cross alike.

    Args:
        q_layout: of the queries.
        kv_layout: of keys and values; sequence i of the queries sees sequence i of the keys, and spare rows
            see spare rows. A pattern's prefix is that of the keys.
        pattern: which keys a query may see within its sequence; one that sees none gets zeros.
        bias: what is added to the scores.
        scale: of the scores; 1 / sqrt(E) when None.
        dropout: of the weights.
    """
    is_plain = bias is None and dropout == 0.0
    if is_plain and varlen_fits(q_THE, pattern) and not _is_one_call(q_layout, kv_layout, pattern):
        return attend_varlen(q_THE, k_UKE, v_UKE, q_layout, kv_layout, pattern, scale)
    if flex_fits(q_THE, dropout) and (bias is not None or not isinstance(pattern, Full | Causal)):
        return attend_flex(q_THE, k_UKE, v_UKE, q_layout, kv_layout, pattern, bias, scale)
    return _attend_grouped(q_THE, k_UKE, v_UKE, q_layout, kv_layout, pattern, bias, scale, dropout)


def _is_one_call(q_layout: Layout, kv_layout: Layout, pattern: Pattern) -> bool:
    """Whether one call of torch's own kernel computes all sequences, without a mask.

    On a GPU it is faster than the kernel of variable lengths: on an H100, for 16 x 1,024 tokens and 16 heads of 64,
    causal, 0.62 ms forward and backward, where that takes 0.92.
    """
    is_even = q_layout.is_even and kv_layout.is_even
    return is_even and (isinstance(pattern, Full) or (isinstance(pattern, Causal) and q_layout == kv_layout))


def attend_reference(
    q_THE: Float[Tensor, "T H E"],
    k_UKE: Float[Tensor, "U K E"],
    v_UKE: Float[Tensor, "U K E"],
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    bias: ScoreBias | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "T H E"], list[Float[Tensor, "H m n"]]]:
    """The oracle: one sequence at a time, dense scores, a mask, a softmax.

    Returns:
        The output, and the attention weights of each sequence.
    """
    share = q_THE.shape[1] // k_UKE.shape[1]
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    outputs, weights = [], []
    rows = zip(q_layout.starts, q_layout.segments, kv_layout.starts, kv_layout.segments, kv_layout.segment_prefixes)
    for q_start, q_length, kv_start, kv_length, prefix_length in rows:
        q_mHE = q_THE[q_start : q_start + q_length]
        k_nHE = k_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        v_nHE = v_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        scores_Hmn = torch.einsum("mhe,nhe->hmn", q_mHE, k_nHE) * scale
        if bias is not None:
            scores_Hmn = scores_Hmn + bias.over(q_length, kv_length).to(scores_Hmn.dtype)
        seen_mn = _visible_densely(pattern, q_length, kv_length, prefix_length, q_THE.device)
        # the softmax of a query that sees nothing is not a number: it is taken over all keys, then emptied
        hidden_mn = ~seen_mn & seen_mn.any(-1, keepdim=True)
        weights_Hmn = scores_Hmn.masked_fill(hidden_mn, -torch.inf).softmax(-1).masked_fill(~seen_mn, 0.0)
        weights.append(weights_Hmn)
        outputs.append(torch.einsum("hmn,nhe->mhe", weights_Hmn, v_nHE))
    return torch.cat(outputs), weights[: q_layout.num_sequences]


def _visible_densely(
    pattern: Pattern, q_length: int, kv_length: int, prefix_length: int, device: torch.device
) -> Bool[Tensor, "m n"]:
    i = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    return visible(pattern, i, torch.arange(kv_length, device=device)[None, :], kv_length, prefix_length)


def _attend_grouped(
    q_THE: Tensor,
    k_UKE: Tensor,
    v_UKE: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    pattern: Pattern,
    bias: ScoreBias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """One SDPA call for all sequences of equal lengths; packs that are sorted by length are not copied.

    Rows are split once and joined once: the gradient of a slice would be a tensor of all rows, and that for
    each group.
    """
    prefixes = kv_layout.segment_prefixes if has_prefix(pattern) else (0,) * len(kv_layout.segments)
    plan = _plan(q_layout.segments, kv_layout.segments, prefixes)
    q_groups = _split(q_THE, plan.q_order, plan.q_rows)
    k_groups, v_groups = (_split(x_UKE, plan.kv_order, plan.kv_rows) for x_UKE in (k_UKE, v_UKE))
    outputs = []
    for group, q, k, v in zip(plan.groups, q_groups, k_groups, v_groups, strict=True):
        q_length, kv_length, prefix_length, _ = group
        if not q_length or not kv_length:  # spare rows of one side that face none of the other
            outputs.append(torch.zeros_like(q))
            continue
        tiles = plan_tiles(pattern, q_length, kv_length, prefix_length, bias is not None)
        if tiles is None:
            outputs.append(_attend_group(q, k, v, group, pattern, bias, scale, dropout))
        else:
            lengths = (q_length, kv_length, prefix_length)
            outputs.append(attend_tiles(q, k, v, lengths, tiles, pattern, bias, scale, dropout))
    o_THE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.q_order is None:
        return o_THE
    return torch.empty_like(o_THE).index_copy(0, torch.from_numpy(plan.q_order).to(o_THE.device), o_THE)


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: tuple[int, int, int, int],
    pattern: Pattern,
    bias: ScoreBias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Sequences of equal lengths that lie end to end, in one call."""
    q_length, kv_length, prefix_length, count = group
    q_GHmE, k_GKnE, v_GKnE = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    is_plain = isinstance(pattern, Full) or (isinstance(pattern, Causal) and q_length == kv_length)
    mask = None
    if bias is not None or not is_plain:
        mask = _visible_densely(pattern, q_length, kv_length, prefix_length, q.device)
        if bias is not None:
            mask = bias.over(q_length, kv_length).to(q.dtype).masked_fill(~mask, -torch.inf)[None]
    if q_length < exact.CPU_MIN_QUERIES and q.is_cpu and not torch.is_grad_enabled():
        q_GHmE, mask = exact.with_spare_queries(q_GHmE), None if mask is None else exact.with_spare_queries(mask)
    o_GHmE = F.scaled_dot_product_attention(
        q_GHmE,
        k_GKnE,
        v_GKnE,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        is_causal=isinstance(pattern, Causal) and mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o_GHmE[:, :, :q_length].transpose(1, 2).reshape(q.shape)


@dataclass(frozen=True)
class _Plan:
    """Groups of sequences of equal lengths.

    Attributes:
        groups: query length, key length, prefix length and number of sequences of each group.
        q_rows, kv_rows: rows of each group.
        q_order, kv_order: rows in the order of the groups; None where they stand so already.
    """

    groups: tuple[tuple[int, int, int, int], ...]
    q_rows: list[int]
    kv_rows: list[int]
    q_order: np.ndarray | None
    kv_order: np.ndarray | None


@lru_cache(maxsize=16)
def _plan(q_segments: tuple[int, ...], kv_segments: tuple[int, ...], prefixes: tuple[int, ...]) -> _Plan:
    """Group the sequences of a batch; every layer asks again for the same one."""
    assert len(q_segments) == len(kv_segments), "each sequence of queries faces one of keys"
    by_lengths: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, lengths in enumerate(zip(q_segments, kv_segments, prefixes)):
        if lengths[0] or lengths[1]:  # no spare rows are no group
            by_lengths[lengths].append(index)
    groups = tuple((*lengths, len(members)) for lengths, members in by_lengths.items())
    order = [index for members in by_lengths.values() for index in members]

    def rows_in(segments: tuple[int, ...]) -> np.ndarray | None:
        if order == sorted(order):
            return None
        starts = np.concatenate([[0], np.cumsum(segments)])
        return np.concatenate([np.arange(starts[index], starts[index + 1]) for index in order])

    return _Plan(
        groups=groups,
        q_rows=[q * count for q, _, _, count in groups],
        kv_rows=[kv * count for _, kv, _, count in groups],
        q_order=rows_in(q_segments),
        kv_order=rows_in(kv_segments),
    )


def _split(x_THE: Tensor, order: np.ndarray | None, rows: list[int]) -> Sequence[Tensor]:
    """The rows of each group; one group is all of them, since the gradient of a split is a copy."""
    if order is not None:
        x_THE = x_THE.index_select(0, torch.from_numpy(order).to(x_THE.device))
    return (x_THE,) if len(rows) == 1 else x_THE.split(rows)
