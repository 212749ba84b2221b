"""Attention of new tokens to keys and values in the slots of a cache: decoding, and prefill in pieces."""

from functools import lru_cache

import torch
from torch.nn import functional as F

from meristem.model.config import Pattern
from meristem.model.kernels.packed import Scoring
from meristem.model.kernels.tiles import attend_tiles, plan_tiles
from meristem.model.kernels.varlen import VARLEN_ARGUMENTS, attend_slots_varlen, varlen_fits
from meristem.model.patterns import Sequence, left_reach, may_see, visible
from meristem.shapes import Bool, Float, Tensor
from meristem.types import Layout


def attend_cached(
    q_THE: Float[Tensor, "T H E"],
    k_RUKE: Float[Tensor, "R U K E"],
    v_RUKE: Float[Tensor, "R U K E"],
    q_layout: Layout,
    kv_lengths: list[int] | tuple[int, ...],
    scoring: Scoring,
    slots: list[int] | None = None,
) -> Float[Tensor, "T H E"]:
    """Scaled dot-product attention to slots of keys; spare rows get zeros.

    Args:
        q_THE: one or more new tokens of each sequence. They are its last places, and their keys are in the slot.
        k_RUKE: slots, one for each sequence; the first `kv_lengths[s]` places are filled.
        scoring: without dropout.
        slots: index of the slot of each sequence; None for slots in the order of sequences, as a GPU needs them.
    """
    lengths = tuple(kv_lengths)
    assert len(lengths) == q_layout.num_sequences, "each sequence of queries has a slot"
    order = list(range(len(lengths)))
    if q_THE.is_cuda:
        assert slots is None or slots == order, "on a GPU slots lie in the order of the sequences"
        if scoring.bias is None and varlen_fits(q_THE, scoring.pattern) and "seqused_k" in VARLEN_ARGUMENTS:
            return attend_slots_varlen(q_THE, k_RUKE, v_RUKE, q_layout, lengths, scoring)
        return _attend_padded(q_THE, k_RUKE, v_RUKE, q_layout, lengths, scoring)
    # views of all slots at once: a step of one token costs little more than its calls
    queries = q_THE[: q_layout.num_tokens].transpose(0, 1).split(q_layout.lengths, dim=1)
    keys, values = k_RUKE.transpose(1, 2).split(1), v_RUKE.transpose(1, 2).split(1)
    outputs = [
        _attend_slot(q_HmE, keys[slot], values[slot], length, prefix_length, scoring)
        for q_HmE, slot, length, prefix_length in zip(queries, slots or order, lengths, q_layout.segment_prefixes)
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
    i = torch.arange(n - m, n)[:, None]
    seen = visible(pattern, i, torch.arange(first, n)[None, :], n, prefix_length)
    return first, None if bool(seen.all()) else seen


_seen_by_one = lru_cache(maxsize=512)(_seen)
"""Of a step of one token; every layer asks again."""


def _attend_padded(
    q_THE: Float[Tensor, "T H E"],
    k_SUKE: Float[Tensor, "S U K E"],
    v_SUKE: Float[Tensor, "S U K E"],
    q_layout: Layout,
    kv_lengths: tuple[int, ...],
    scoring: Scoring,
) -> Float[Tensor, "T H E"]:
    """All sequences in one masked call, queries padded at their front: where a call costs more than padding."""
    m, n, device = max(q_layout.lengths), max(kv_lengths), q_THE.device
    pattern, bias = scoring.pattern, scoring.bias
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
        scale=scoring.scale,
        enable_gqa=q_THE.shape[1] != k_SUKE.shape[2],
    )
    o_THE = o_SHmE.transpose(1, 2).flatten(0, 1).index_select(0, rows_T)
    return F.pad(o_THE, (0, 0, 0, 0, 0, q_layout.num_spare))
