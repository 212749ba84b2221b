"""Attention of new tokens to keys and values in the slots of a cache: decoding, and prefill in pieces."""

from functools import lru_cache

import torch
from torch.nn import functional as F

from meristem.model.config import Pattern
from meristem.model.kernels.packed import Scoring, Slotted
from meristem.model.kernels.tiles import attend_tiles, plan_tiles
from meristem.model.kernels.varlen import VARLEN_ARGUMENTS, attend_slots_varlen, varlen_fits
from meristem.model.patterns import Sequence, left_reach, may_see, visible
from meristem.shapes import Bool, Float, Tensor


def attend_cached(slotted: Slotted, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """Scaled dot-product attention to slots of keys, without dropout; spare rows get zeros."""
    q_THE, q_layout, pattern = slotted.q_THE, slotted.q_layout, scoring.pattern
    if q_THE.is_cuda:
        is_varlen = scoring.bias is None and varlen_fits(q_THE, pattern) and "seqused_k" in VARLEN_ARGUMENTS
        return attend_slots_varlen(slotted, scoring) if is_varlen else _attend_padded(slotted, scoring)
    # views of all slots at once: a step of one token costs little more than its calls
    queries = q_THE[: q_layout.num_tokens].transpose(0, 1).split(q_layout.lengths, dim=1)
    keys, values = (x_RUKE.transpose(1, 2).split(1) for x_RUKE in (slotted.k_RUKE, slotted.v_RUKE))
    rows = zip(queries, slotted.slots, slotted.kv_lengths, q_layout.segment_prefixes)
    outputs = [
        _attend_slot(q_HmE, keys[slot], values[slot], length, prefix_length, scoring)
        for q_HmE, slot, length, prefix_length in rows
    ]
    return torch.cat([*outputs, q_THE.new_zeros(q_layout.num_spare, *q_THE.shape[1:])])


def _attend_slot(
    q_HmE: Float[Tensor, "H m E"],
    k_1KUE: Float[Tensor, "1 K U E"],
    v_1KUE: Float[Tensor, "1 K U E"],
    kv_length: int,
    prefix_length: int,
    scoring: Scoring,
) -> Float[Tensor, "m H E"]:
    """One sequence in a call of its own, on views of its slot."""
    m, n, pattern, bias = q_HmE.shape[1], kv_length, scoring.pattern, scoring.bias
    if not m:
        return q_HmE.transpose(0, 1)
    plan = plan_tiles(pattern, m, n, prefix_length, bias is not None)
    if plan is not None:
        k_nKE, v_nKE = (x[0, :, :n].transpose(0, 1) for x in (k_1KUE, v_1KUE))
        return attend_tiles(q_HmE.transpose(0, 1), k_nKE, v_nKE, (m, n, prefix_length), plan, scoring)
    first, mask = (_seen_by_one if m == 1 else _seen)(pattern, m, n, prefix_length)
    if bias is not None:
        scores_Hmn = bias.over(m, n)[:, :, first:].to(q_HmE.dtype)
        mask = (scores_Hmn if mask is None else scores_Hmn.masked_fill(~mask, -torch.inf))[None]
    o_1HmE = F.scaled_dot_product_attention(
        q_HmE[None],
        k_1KUE.narrow(2, first, n - first),
        v_1KUE.narrow(2, first, n - first),
        attn_mask=mask,
        scale=scoring.scale,
        enable_gqa=q_HmE.shape[0] != k_1KUE.shape[1],
    )
    return o_1HmE[0].transpose(0, 1)


def _seen(pattern: Pattern, m: int, n: int, prefix_length: int) -> tuple[int, Bool[Tensor, "m seen"] | None]:
    """The first key that the last m of n places may see, and which from there on; None where they see all of these."""
    reach = left_reach(pattern)
    first = 0 if reach is None else max(0, n - m - reach)
    seen = visible(pattern, m, n, prefix_length, torch.device("cpu"), first)
    return first, None if bool(seen.all()) else seen


_seen_by_one = lru_cache(maxsize=512)(_seen)
"""Of a step of one token; every layer asks again."""


def _attend_padded(slotted: Slotted, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """All sequences in one masked call, queries padded at their front: where a call costs more than padding."""
    q_THE, q_layout, pattern, bias = slotted.q_THE, slotted.q_layout, scoring.pattern, scoring.bias
    m, n, device = max(q_layout.lengths), max(slotted.kv_lengths), q_THE.device
    rows = [slot * m + m - length + row for slot, length in enumerate(q_layout.lengths) for row in range(length)]
    rows_T = torch.tensor(rows).to(device, non_blocking=True)
    q_SmHE = q_THE.new_zeros(q_layout.num_sequences * m, *q_THE.shape[1:])
    q_SmHE = q_SmHE.index_copy(0, rows_T, q_THE[: q_layout.num_tokens]).unflatten(0, (-1, m))
    j = torch.arange(n, device=device)[None, :]
    masks = []
    for kv_length, prefix_length in zip(slotted.kv_lengths, q_layout.segment_prefixes):
        i = torch.arange(kv_length - m, kv_length, device=device)[:, None]
        around = Sequence.of(pattern, kv_length, prefix_length, device)
        seen = (may_see(pattern, (i, i), (j, j), around) & (j < kv_length)).expand(m, n)[None]
        masks.append(seen if bias is None else bias.at(i, j).to(q_THE.dtype).masked_fill(~seen, -torch.inf))
    o_SHmE = F.scaled_dot_product_attention(
        q_SmHE.transpose(1, 2),
        slotted.k_RUKE[:, :n].transpose(1, 2),
        slotted.v_RUKE[:, :n].transpose(1, 2),
        attn_mask=torch.stack(masks),
        scale=scoring.scale,
        enable_gqa=q_THE.shape[1] != slotted.k_RUKE.shape[2],
    )
    o_THE = o_SHmE.transpose(1, 2).flatten(0, 1).index_select(0, rows_T)
    return F.pad(o_THE, (0, 0, 0, 0, 0, q_layout.num_spare))
