"""Attention of new tokens to keys and values that are kept in slots: decoding, and prefill in pieces."""

import torch
from torch.nn import functional as F

from meristem.model.config import Pattern
from meristem.model.patterns import Sequence, left_reach, may_see, visible
from meristem.model.position import ScoreBias
from meristem.model.tiles import attend_tiles, plan_tiles
from meristem.model.varlen import VARLEN_ARGUMENTS, attend_slots_varlen, varlen_fits
from meristem.shapes import Float, Tensor
from meristem.types import Layout


def attend_cached(
    q_THE: Float[Tensor, "T H E"],
    k_SUKE: Float[Tensor, "S U K E"],
    v_SUKE: Float[Tensor, "S U K E"],
    q_layout: Layout,
    kv_lengths: list[int] | tuple[int, ...],
    pattern: Pattern,
    bias: ScoreBias | None = None,
    scale: float | None = None,
) -> Float[Tensor, "T H E"]:
    """Scaled dot-product attention to slots of keys; spare rows get zeros.

    Args:
        q_THE: new tokens of each sequence, one or many; they are its last places, and their keys are in the slot.
        k_SUKE: a slot a sequence; of slot s the first `kv_lengths[s]` places are filled.
        pattern: which keys a query may see within its sequence.
        bias: what is added to the scores.
        scale: of the scores; 1 / sqrt(E) when None.
    """
    lengths = tuple(kv_lengths)
    assert len(lengths) == q_layout.num_sequences, "each sequence of queries has a slot"
    if bias is None and varlen_fits(q_THE, pattern) and "seqused_k" in VARLEN_ARGUMENTS:
        return attend_slots_varlen(q_THE, k_SUKE, v_SUKE, q_layout, lengths, pattern, scale)
    if q_THE.is_cuda:
        return _attend_padded(q_THE, k_SUKE, v_SUKE, q_layout, lengths, pattern, bias, scale)
    outputs = []
    for slot, (start, q_length, kv_length) in enumerate(zip(q_layout.starts, q_layout.lengths, lengths)):
        q_mHE = q_THE[start : start + q_length]
        prefix_length = q_layout.segment_prefixes[slot]
        k_nKE, v_nKE = k_SUKE[slot, :kv_length], v_SUKE[slot, :kv_length]
        outputs.append(_attend_slot(q_mHE, k_nKE, v_nKE, pattern, prefix_length, bias, scale))
    return torch.cat([*outputs, q_THE.new_zeros(q_layout.num_spare, *q_THE.shape[1:])])


def _attend_slot(
    q_mHE: Float[Tensor, "m H E"],
    k_nKE: Float[Tensor, "n K E"],
    v_nKE: Float[Tensor, "n K E"],
    pattern: Pattern,
    prefix_length: int,
    bias: ScoreBias | None,
    scale: float | None,
) -> Float[Tensor, "m H E"]:
    """One sequence in a call of its own, on views of its slot: so its bits do not depend on the others."""
    m, n = len(q_mHE), len(k_nKE)
    if not m:
        return q_mHE
    plan = plan_tiles(pattern, m, n, prefix_length, bias is not None)
    if plan is not None:
        return attend_tiles(q_mHE, k_nKE, v_nKE, (m, n, prefix_length), plan, pattern, bias, scale, 0.0)
    reach = left_reach(pattern)
    first = 0 if reach is None else max(0, n - m - reach)
    i = torch.arange(n - m, n)[:, None]
    seen = visible(pattern, i, torch.arange(first, n)[None, :], n, prefix_length)
    mask: Tensor | None = None if bool(seen.all()) else seen
    if bias is not None:
        scores_Hmn = bias.over(m, n)[:, :, first:].to(q_mHE.dtype)
        mask = scores_Hmn.masked_fill(~seen, -torch.inf)[None]
    o_1HmE = F.scaled_dot_product_attention(
        q_mHE.transpose(0, 1)[None],
        k_nKE[first:].transpose(0, 1)[None],
        v_nKE[first:].transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_mHE.shape[1] != k_nKE.shape[1],
    )
    return o_1HmE[0].transpose(0, 1)


def _attend_padded(
    q_THE: Float[Tensor, "T H E"],
    k_SUKE: Float[Tensor, "S U K E"],
    v_SUKE: Float[Tensor, "S U K E"],
    q_layout: Layout,
    kv_lengths: tuple[int, ...],
    pattern: Pattern,
    bias: ScoreBias | None,
    scale: float | None,
) -> Float[Tensor, "T H E"]:
    """All sequences in one masked call, queries padded at their front: where a call costs more than padding."""
    m, n, device = max(q_layout.lengths), max(kv_lengths), q_THE.device
    rows = [slot * m + m - length + row for slot, length in enumerate(q_layout.lengths) for row in range(length)]
    rows_T = torch.tensor(rows).to(device, non_blocking=True)
    q_SmHE = q_THE.new_zeros(q_layout.num_sequences * m, *q_THE.shape[1:])
    q_SmHE = q_SmHE.index_copy(0, rows_T, q_THE[: q_layout.num_tokens]).unflatten(0, (-1, m))
    j = torch.arange(n, device=device)[None, :]
    masks = []
    for kv_length, prefix_length in zip(kv_lengths, q_layout.segment_prefixes):
        i = torch.arange(kv_length - m, kv_length, device=device)[:, None]
        around = Sequence.of(pattern, kv_length, prefix_length, device)
        seen = (may_see(pattern, (i, i), (j, j), around) & (j < kv_length)).expand(m, n)[None]
        masks.append(seen if bias is None else bias.at(i, j).to(q_THE.dtype).masked_fill(~seen, -torch.inf))
    o_SHmE = F.scaled_dot_product_attention(
        q_SmHE.transpose(1, 2),
        k_SUKE[:, :n].transpose(1, 2),
        v_SUKE[:, :n].transpose(1, 2),
        attn_mask=torch.stack(masks),
        scale=scale,
        enable_gqa=q_THE.shape[1] != k_SUKE.shape[2],
    )
    o_THE = o_SHmE.transpose(1, 2).flatten(0, 1).index_select(0, rows_T)
    return F.pad(o_THE, (0, 0, 0, 0, 0, q_layout.num_spare))
