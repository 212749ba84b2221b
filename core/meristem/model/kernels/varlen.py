"""Flash attention over packed sequences of different lengths: CUDA, half precision, full or windowed patterns."""

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch.nn import functional as F

from meristem.model.config import Pattern
from meristem.model.kernels.packed import Packed, Scoring, Slotted
from meristem.model.patterns import window_of
from meristem.shapes import Float, Int, Tensor

VARLEN_ARGUMENTS: frozenset[str] = frozenset()
if torch.cuda.device_count():  # its import draws in torch's compiler, half of the start of `embed` on a CPU
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 has no window_size yet; causal attention is said by one from 2.12 on
        VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)


def varlen_fits(q_THE: Float[Tensor, "T H E"], pattern: Pattern) -> bool:
    """Whether this kernel can compute the pattern: on CUDA, in half precision, for a window that it supports."""
    is_half = q_THE.dtype in (torch.bfloat16, torch.float16)
    return q_THE.is_cuda and is_half and bool(VARLEN_ARGUMENTS) and _window_options(pattern) is not None


def attend_varlen(packed: Packed, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """Attention of packed queries to packed keys."""
    q_layout, kv_layout = packed.q_layout, packed.kv_layout
    bounds = (q_layout.cu_seqlens, kv_layout.cu_seqlens, q_layout.max_length, kv_layout.max_length)
    return _call(packed.q_THE, packed.k_UKE, packed.v_UKE, bounds, scoring)


def attend_slots_varlen(slotted: Slotted, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """Attention of new tokens to keys in slots; without gradient."""
    q_layout, device = slotted.q_layout, slotted.q_THE.device
    num_slots, capacity = slotted.k_RUKE.shape[:2]
    k_starts = torch.arange(num_slots + 1, dtype=torch.int32, device=device) * capacity
    o_THE = _call(
        slotted.q_THE[: q_layout.num_tokens],
        slotted.k_RUKE.flatten(0, 1),
        slotted.v_RUKE.flatten(0, 1),
        (q_layout.cu_seqlens[:-1], k_starts, max(q_layout.lengths), max(slotted.kv_lengths)),
        scoring,
        seqused_k=torch.tensor(slotted.kv_lengths, dtype=torch.int32).to(device, non_blocking=True),
    )
    return F.pad(o_THE, (0, 0, 0, 0, 0, q_layout.num_spare))


def _window_options(pattern: Pattern) -> dict[str, Any] | None:
    """Arguments that give the pattern to the kernel; None where it does not support the pattern."""
    window = window_of(pattern)
    if window == (-1, -1):
        return {}
    if window is not None and "window_size" in VARLEN_ARGUMENTS:
        return {"window_size": window}
    return {"is_causal": True} if window == (-1, 0) and "is_causal" in VARLEN_ARGUMENTS else None


def _call(
    q_THE: Tensor,
    k_UKE: Tensor,
    v_UKE: Tensor,
    bounds: tuple[Int[Tensor, "s"], Int[Tensor, "s"], int, int],
    scoring: Scoring,
    **more: Any,
) -> Tensor:
    """Call the kernel.

    Args:
        bounds: where sequences of queries and of keys begin, and the longest of each.
    """
    options = {**(_window_options(scoring.pattern) or {}), **more}
    if q_THE.shape[1] != k_UKE.shape[1]:
        if "enable_gqa" in VARLEN_ARGUMENTS:
            options["enable_gqa"] = True
        else:
            share = q_THE.shape[1] // k_UKE.shape[1]
            k_UKE, v_UKE = k_UKE.repeat_interleave(share, 1), v_UKE.repeat_interleave(share, 1)
    if scoring.scale is not None:
        options["scale"] = scoring.scale
    o_THE = varlen_attn(q_THE, k_UKE, v_UKE, *bounds, **options)
    assert isinstance(o_THE, Tensor)  # not asked for more
    return o_THE
