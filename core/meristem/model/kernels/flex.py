"""FlexAttention on CUDA, for patterns and score biases that the variable-length kernel does not support.

Torch's module is imported where it is used: the import takes a third of a second, and a CPU never needs it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from meristem.model.config import BlockSparse, Pattern
from meristem.model.kernels.packed import Packed, Scoring
from meristem.model.kernels.tiles import scores_by_distance
from meristem.model.patterns import Sequence, may_see, parts_of, random_blocks
from meristem.model.position import ScoreBias
from meristem.shapes import Float, Int, Tensor
from meristem.types import Layout

MIN_HEAD_WIDTH = 16
"""Narrowest heads that the compiled kernel supports."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_fits(q_THE: Float[Tensor, "T H E"], dropout: float) -> bool:
    """Whether FlexAttention can compute this: on CUDA, without dropout."""
    return q_THE.is_cuda and dropout == 0.0 and q_THE.shape[2] >= MIN_HEAD_WIDTH


def attend_flex(packed: Packed, scoring: Scoring) -> Float[Tensor, "T H E"]:
    """The pack as one long sequence whose mask keeps its sequences apart."""
    layouts = packed.q_layout, packed.kv_layout
    o_1HTE = _compiled_attention()(
        *(rows.transpose(0, 1)[None] for rows in (packed.q_THE, packed.k_UKE, packed.v_UKE)),
        score_mod=None if scoring.bias is None else score_function(scoring.bias, *layouts),
        block_mask=_block_mask(scoring.pattern, *layouts),
        scale=scoring.scale,
        enable_gqa=packed.q_THE.shape[1] != packed.k_UKE.shape[1],
    )
    return o_1HTE[0].transpose(0, 1)


def mask_function(pattern: Pattern, q_layout: Layout, kv_layout: Layout) -> MaskFunction:
    """The pattern as the `mask_mod` of FlexAttention: whether row `q` of the queries sees row `kv` of the keys."""
    q_segments, kv_segments = q_layout.segment_of_row, kv_layout.segment_of_row
    q_places, kv_places = _places(q_layout, kv_layout)
    prefixes = torch.tensor(kv_layout.segment_prefixes).to(q_layout.device)
    tables = {
        part: _drawn_by_row(part, q_layout, kv_layout) for part in parts_of(pattern) if isinstance(part, BlockSparse)
    }

    def sees(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        def drawn(part: BlockSparse, blocks: Tensor, pick: int) -> Tensor:
            return tables[part][q, pick]

        i, j = q_places[q], kv_places[kv]
        sequence = Sequence(prefixes[q_segments[q]], drawn)
        return may_see(pattern, (i, i), (j, j), sequence) & (q_segments[q] == kv_segments[kv])

    return sees


def score_function(bias: ScoreBias, q_layout: Layout, kv_layout: Layout) -> ScoreFunction:
    """The bias as the `score_mod` of FlexAttention, looked up by distance."""
    q_places, kv_places = _places(q_layout, kv_layout)
    length = max(q_layout.max_length, kv_layout.max_length)
    by_distance = scores_by_distance(bias, length, q_layout.device)

    def scored(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # rows of other sequences are masked, but looked up all the same
        distance = (kv_places[kv] - q_places[q]).clamp(1 - length, length - 1)
        return score + by_distance[head, distance + length - 1]

    return scored


def _places(q_layout: Layout, kv_layout: Layout) -> tuple[Int[Tensor, "T"], Int[Tensor, "U"]]:
    """Place of each row within its sequence, counted from the first key; queries are the last ones."""
    pairs = zip(q_layout.segments, kv_layout.segments, strict=True)
    q_places = [np.arange(kv_length - q_length, kv_length) for q_length, kv_length in pairs]
    kv_places = [np.arange(kv_length) for kv_length in kv_layout.segments]
    q_T, kv_U = (torch.from_numpy(np.concatenate(places)) for places in (q_places, kv_places))
    return q_T.to(q_layout.device), kv_U.to(q_layout.device)


def _drawn_by_row(pattern: BlockSparse, q_layout: Layout, kv_layout: Layout) -> Int[Tensor, "T num_random"]:
    """Blocks drawn for the block of each query."""
    drawn = []
    for q_length, kv_length in zip(q_layout.segments, kv_layout.segments, strict=True):
        blocks = np.maximum(np.arange(kv_length - q_length, kv_length), 0) // pattern.block
        drawn.append(random_blocks(pattern, max(1, -(-kv_length // pattern.block)))[blocks])
    return torch.from_numpy(np.concatenate(drawn)).to(q_layout.device)


@lru_cache(maxsize=16)
def _block_mask(pattern: Pattern, q_layout: Layout, kv_layout: Layout) -> Any:
    """Made once a pack and pattern, though every layer asks for it."""
    from torch.nn.attention.flex_attention import create_block_mask

    sees = mask_function(pattern, q_layout, kv_layout)
    return create_block_mask(sees, None, None, q_layout.num_rows, kv_layout.num_rows, device=q_layout.device)


@lru_cache(maxsize=1)
def _compiled_attention() -> Callable[..., Any]:
    """Compiled where it is first needed: without, every score would be an element of a tensor."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
