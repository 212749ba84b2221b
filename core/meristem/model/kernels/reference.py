"""Packed attention as it is defined: slow, obvious, and what the other kernels are tested against."""

import torch

from meristem.model.kernels.packed import Packed, Scoring
from meristem.model.patterns import visible
from meristem.shapes import Float, Tensor


def attend_reference(packed: Packed, scoring: Scoring) -> tuple[Float[Tensor, "T H E"], list[Float[Tensor, "H m n"]]]:
    """The output, and the weights of each sequence, one at a time: dense scores, a mask, a softmax; without dropout."""
    q_THE, k_UKE, v_UKE = packed.q_THE, packed.k_UKE, packed.v_UKE
    q_layout, kv_layout = packed.q_layout, packed.kv_layout
    share = q_THE.shape[1] // k_UKE.shape[1]
    scale = q_THE.shape[2] ** -0.5 if scoring.scale is None else scoring.scale
    outputs, weights = [], []
    rows = zip(q_layout.starts, q_layout.segments, kv_layout.starts, kv_layout.segments, kv_layout.segment_prefixes)
    for q_start, q_length, kv_start, kv_length, prefix_length in rows:
        q_mHE = q_THE[q_start : q_start + q_length]
        k_nHE = k_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        v_nHE = v_UKE[kv_start : kv_start + kv_length].repeat_interleave(share, dim=1)
        scores_Hmn = torch.einsum("mhe,nhe->hmn", q_mHE, k_nHE) * scale
        if scoring.bias is not None:
            scores_Hmn = scores_Hmn + scoring.bias.over(q_length, kv_length).to(scores_Hmn.dtype)
        seen_mn = visible(scoring.pattern, q_length, kv_length, prefix_length, q_THE.device)
        # the softmax of a query that sees nothing is not a number: it is taken over all keys, then emptied
        hidden_mn = ~seen_mn & seen_mn.any(-1, keepdim=True)
        weights_Hmn = scores_Hmn.masked_fill(hidden_mn, -torch.inf).softmax(-1).masked_fill(~seen_mn, 0.0)
        weights.append(weights_Hmn)
        outputs.append(torch.einsum("hmn,nhe->mhe", weights_Hmn, v_nHE))
    return torch.cat(outputs), weights[: q_layout.num_sequences]
