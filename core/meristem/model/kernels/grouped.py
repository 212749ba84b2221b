"""One SDPA call for all sequences of equal lengths."""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from meristem.model import exact
from meristem.model.config import Causal, Full
from meristem.model.kernels.packed import Packed, Scoring
from meristem.model.kernels.tiles import attend_tiles, plan_tiles
from meristem.model.patterns import has_prefix, visible
from meristem.shapes import Float, Tensor


def attend_grouped(packed: Packed, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """One SDPA call for all sequences of equal lengths; packs that are sorted by length are not copied.

    Rows are split once and joined once: the gradient of a slice would be a tensor of all rows, and that for
    each group.
    """
    segments, kv_layout, pattern = packed.q_layout.segments, packed.kv_layout, scoring.pattern
    prefixes = kv_layout.segment_prefixes if has_prefix(pattern) else (0,) * len(kv_layout.segments)
    groups, q_order, kv_order = _plan(segments, kv_layout.segments, prefixes)
    q_groups = _split(packed.q_THE, q_order, [length * count for length, _, _, count in groups])
    kv_rows = [length * count for _, length, _, count in groups]
    k_groups, v_groups = (_split(x_UKE, kv_order, kv_rows) for x_UKE in (packed.k_UKE, packed.v_UKE))
    outputs = []
    for group, q, k, v in zip(groups, q_groups, k_groups, v_groups, strict=True):
        q_length, kv_length, prefix_length, _ = group
        if not q_length or not kv_length:  # spare rows of one side that face none of the other
            outputs.append(torch.zeros_like(q))
            continue
        tiles = plan_tiles(pattern, q_length, kv_length, prefix_length, scoring.bias is not None)
        if tiles is None:
            outputs.append(_attend_group(q, k, v, group, scoring))
        else:
            outputs.append(attend_tiles(q, k, v, (q_length, kv_length, prefix_length), tiles, scoring))
    o_THE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if q_order is None:
        return o_THE
    return torch.empty_like(o_THE).index_copy(0, torch.from_numpy(q_order).to(o_THE.device), o_THE)


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: tuple[int, int, int, int], scoring: Scoring) -> Tensor:
    """Sequences of equal lengths that lie end to end, in one call."""
    q_length, kv_length, prefix_length, count = group
    pattern, bias = scoring.pattern, scoring.bias
    q_GHmE, k_GKnE, v_GKnE = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    is_plain = isinstance(pattern, Full) or (isinstance(pattern, Causal) and q_length == kv_length)
    mask = None
    if bias is not None or not is_plain:
        mask = visible(pattern, q_length, kv_length, prefix_length, q.device)
        if bias is not None:
            mask = bias.over(q_length, kv_length).to(q.dtype).masked_fill(~mask, -torch.inf)[None]
    if q_length < exact.CPU_MIN_QUERIES and q.is_cpu and not torch.is_grad_enabled():
        q_GHmE, mask = exact.with_spare_queries(q_GHmE), None if mask is None else exact.with_spare_queries(mask)
    o_GHmE = F.scaled_dot_product_attention(
        q_GHmE,
        k_GKnE,
        v_GKnE,
        attn_mask=mask,
        dropout_p=scoring.dropout,
        scale=scoring.scale,
        is_causal=isinstance(pattern, Causal) and mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o_GHmE[:, :, :q_length].transpose(1, 2).reshape(q.shape)


@lru_cache(maxsize=16)
def _plan(
    q_segments: tuple[int, ...], kv_segments: tuple[int, ...], prefixes: tuple[int, ...]
) -> tuple[tuple[tuple[int, int, int, int], ...], np.ndarray | None, np.ndarray | None]:
    """Group the sequences of a batch; every layer asks again for the same one.

    Returns:
        Query length, key length, prefix length and number of sequences of each group; then rows of queries and rows of
        keys in the order of the groups, None where they stand so already.
    """
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

    return groups, rows_in(q_segments), rows_in(kv_segments)


def _split(x_THE: Tensor, order: np.ndarray | None, rows: list[int]) -> Sequence[Tensor]:
    """The rows of each group; one group is all of them, since the gradient of a split is a copy."""
    if order is not None:
        x_THE = x_THE.index_select(0, torch.from_numpy(order).to(x_THE.device))
    return (x_THE,) if len(rows) == 1 else x_THE.split(rows)
