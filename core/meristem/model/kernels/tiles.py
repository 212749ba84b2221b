"""Sparse patterns on tiles: the cost grows with the keys that are seen, not with the square of the length.

Queries are cut into tiles. For each it is asked which tiles of keys it may see; these are gathered, and an exact mask
for just these places goes into one SDPA call for many tiles that see as many others.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from meristem.model.config import Causal, Full, Pattern
from meristem.model.kernels.packed import Scoring
from meristem.model.patterns import Sequence, is_relative, may_see
from meristem.model.position import ScoreBias
from meristem.shapes import Bool, Float, Tensor

TILES = (64, 128, 256, 512, 1024)
MAX_TILES_SEEN = 9
"""Tiles that a tile sees on average, at most, where a larger tile may be taken instead: each is a copy of its keys."""

MIN_KEYS = 256
"""Sequences of no more keys are masked densely."""

MAX_DENSE_KEYS = 2048
"""Sequences of no more keys are masked densely where most tiles see each other."""

ROWS_AT_ONCE = 8192
"""Rows of keys gathered for one call, at most, unless one tile sees more."""

SPANS_AT_ONCE = 2**22
"""Pairs of tiles that are asked about at once."""


@dataclass(frozen=True)
class TilePlan:
    """Which tiles of one sequence see each other.

    Attributes:
        tile: number of places in a tile.
        groups: `[g]` indices of tiles of queries that each see the same number of tiles of keys, and `[g, c]` indices
            of the tiles of keys that each may see. Every tile of queries is in one group.
    """

    tile: int
    groups: tuple[tuple[np.ndarray, np.ndarray], ...]


@lru_cache(maxsize=64)
def plan_tiles(pattern: Pattern, q_length: int, kv_length: int, prefix_length: int, has_bias: bool) -> TilePlan | None:
    """Plan how to run the pattern on tiles; None where a dense mask, or no mask, is as fast."""
    needs_mask = has_bias or not (isinstance(pattern, Full) or (isinstance(pattern, Causal) and q_length == kv_length))
    if not needs_mask or kv_length <= MIN_KEYS or q_length < TILES[0] or q_length > kv_length:
        return None
    for tile in TILES:
        groups, seen_frac = _group_tiles(pattern, q_length, kv_length, prefix_length, tile)
        if seen_frac > 0.5 and kv_length <= MAX_DENSE_KEYS:
            return None
        if seen_frac * kv_length / tile <= MAX_TILES_SEEN:
            break
    return TilePlan(tile, groups)


def _group_tiles(
    pattern: Pattern, q_length: int, kv_length: int, prefix_length: int, tile: int
) -> tuple[tuple[tuple[np.ndarray, np.ndarray], ...], float]:
    """Tiles grouped by how many others they see, and the share of all pairs that see each other."""
    sequence = Sequence.of(pattern, kv_length, prefix_length, torch.device("cpu"))
    keys = torch.arange(0, kv_length, tile)[None, :]
    starts = torch.arange(kv_length - q_length, kv_length, tile)[:, None]
    queries_of: dict[int, list[int]] = {}
    keys_of: dict[int, list[np.ndarray]] = {}
    num_seen = 0
    for first in range(0, len(starts), slab := max(1, SPANS_AT_ONCE // keys.shape[1])):
        spans = starts[first : first + slab]
        ends = ((spans + tile - 1).clamp(max=kv_length - 1), (keys + tile - 1).clamp(max=kv_length - 1))
        seen = may_see(pattern, (spans, ends[0]), (keys, ends[1]), sequence, tile)
        for row, is_seen in enumerate(seen.broadcast_to(len(spans), keys.shape[1]).numpy()):
            # a tile that sees nothing is shown one tile, and all of that is masked
            columns = np.flatnonzero(is_seen) if is_seen.any() else np.zeros(1, np.int64)
            queries_of.setdefault(len(columns), []).append(first + row)
            keys_of.setdefault(len(columns), []).append(columns)
            num_seen += len(columns)
    groups = tuple((np.array(queries_of[count]), np.stack(keys_of[count])) for count in queries_of)
    return groups, num_seen / (len(starts) * keys.shape[1])


def attend_tiles(
    q_RHE: Float[Tensor, "R H E"],
    k_RKE: Float[Tensor, "r K E"],
    v_RKE: Float[Tensor, "r K E"],
    lengths: tuple[int, int, int],
    plan: TilePlan,
    scoring: Scoring,
) -> Float[Tensor, "R H E"]:
    """Attention within each of some sequences of equal lengths that lie end to end.

    Args:
        lengths: queries, keys and prefix of each sequence.
        plan: of these lengths and this pattern.
    """
    q_length, kv_length, prefix_length = lengths
    count, device = q_RHE.shape[0] // q_length, q_RHE.device
    chunks = []
    for queries, keys in plan.groups:
        size = max(1, ROWS_AT_ONCE // (keys.shape[1] * plan.tile * count))
        for part in (slice(start, start + size) for start in range(0, len(queries), size)):
            chunks.append(_Chunk.of(queries[part], keys[part], plan.tile, q_length, kv_length, count))
    sequence, bias = Sequence.of(scoring.pattern, kv_length, prefix_length, device), scoring.bias
    by_distance = None if bias is None else scores_by_distance(bias, kv_length, device).to(q_RHE.dtype)
    work = _Work(scoring, sequence, count, tuple(chunks))
    return _Tiled.apply(q_RHE, k_RKE, v_RKE, by_distance, work)


@dataclass(frozen=True)
class _Chunk:
    """Tiles that one call computes. Places past the end stand for the last one; they are masked, or not kept.

    Attributes:
        i: `[g, m]` places of the queries in their sequence, counted from the first key.
        j: `[g, n]` places of the keys.
        is_inside: `[g, n]` whether there is such a key.
        is_alike: each tile of queries sees keys at the same distances, and all places are inside.
        q_rows, kv_rows: rows of the queries and keys of all sequences, tile after tile.
        kept: which of the queries are inside.
    """

    i: np.ndarray
    j: np.ndarray
    is_inside: np.ndarray
    is_alike: bool
    q_rows: np.ndarray
    kv_rows: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(
        cls, queries: np.ndarray, keys: np.ndarray, tile: int, q_length: int, kv_length: int, count: int
    ) -> "_Chunk":
        q_places = queries[:, None] * tile + np.arange(tile)
        kv_places = (keys[:, :, None] * tile + np.arange(tile)).reshape(len(keys), -1)
        relative, is_inside, is_kept = keys - queries[:, None], kv_places < kv_length, q_places < q_length
        q_places, kv_places = np.minimum(q_places, q_length - 1), np.minimum(kv_places, kv_length - 1)
        sequences = np.arange(count)[:, None]
        return cls(
            i=q_places + kv_length - q_length,
            j=kv_places,
            is_inside=is_inside,
            is_alike=bool((relative == relative[0]).all() and is_inside.all() and is_kept.all()),
            q_rows=(q_places[:, None, :] + sequences * q_length).reshape(-1),
            kv_rows=(kv_places[:, None, :] + sequences * kv_length).reshape(-1),
            kept=np.flatnonzero(np.broadcast_to(is_kept[:, None, :], (len(queries), count, tile))),
        )


@dataclass(frozen=True)
class _Work:
    """What is computed, chunk by chunk, beside the tensors it is computed of."""

    scoring: Scoring
    sequence: Sequence
    count: int
    chunks: tuple[_Chunk, ...]

    def attend(
        self, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, by_distance: Float[Tensor, "H d"] | None
    ) -> Float[Tensor, "kept H E"]:
        """One call for gathered rows of a chunk; those of the queries that are inside are kept."""
        q_BHmE, k_BKnE, v_BKnE = (x.unflatten(0, (self.count * len(chunk.i), -1)).transpose(1, 2) for x in (q, k, v))
        o_BHmE = F.scaled_dot_product_attention(
            q_BHmE,
            k_BKnE,
            v_BKnE,
            attn_mask=self._mask(chunk, by_distance, q.device),
            dropout_p=self.scoring.dropout,
            scale=self.scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        o_rHE = o_BHmE.transpose(1, 2).flatten(0, 1)
        return o_rHE if len(chunk.kept) == len(o_rHE) else o_rHE.index_select(0, _on(chunk.kept, q.device))

    def _mask(
        self, chunk: _Chunk, by_distance: Float[Tensor, "H d"] | None, device: torch.device
    ) -> Bool[Tensor, "B h m n"] | Float[Tensor, "B h m n"]:
        """What the tiles of a chunk see, and what is added to their scores: one mask for all where they are alike."""
        is_shared = chunk.is_alike and is_relative(self.scoring.pattern)
        some = slice(0, 1) if is_shared else slice(None)
        i, j, is_inside = (_on(x[some], device) for x in (chunk.i[:, :, None], chunk.j[:, None], chunk.is_inside))
        seen = may_see(self.scoring.pattern, (i, i), (j, j), self.sequence) & is_inside[:, None]
        mask = seen.expand(-1, i.shape[1], -1)[:, None]
        if by_distance is not None:
            distance = (j - i + by_distance.shape[1] // 2).flatten()
            scores = by_distance.index_select(1, distance).unflatten(1, (len(i), i.shape[1], -1)).transpose(0, 1)
            mask = scores.masked_fill(~mask, -torch.inf)
        if is_shared or self.count == 1:
            return mask
        return mask[:, None].expand(-1, self.count, -1, -1, -1).flatten(0, 1)


class _Tiled(torch.autograd.Function):
    """All chunks, one after the other, each computed again for its gradient.

    Nothing gathered is kept: a key is gathered once for each tile that sees it, five times in a window of 256. Left to
    autograd, the gradient of each gathering were a tensor of all rows besides, and the cost the square of the length.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, by_distance: Tensor | None, work: _Work) -> Tensor:
        ctx.save_for_backward(q, k, v, by_distance)
        kind = q.device.type
        ctx.work, ctx.autocast = work, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.random = None
        if work.scoring.dropout:
            ctx.random = torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()
        o: Tensor | None = None
        for chunk in work.chunks:
            q_rows, kv_rows = _on(chunk.q_rows, q.device), _on(chunk.kv_rows, q.device)
            gathered = (q.index_select(0, q_rows), k.index_select(0, kv_rows), v.index_select(0, kv_rows))
            part = work.attend(chunk, *gathered, by_distance)
            o = part.new_empty(q.shape) if o is None else o
            o.index_copy_(0, _on(chunk.q_rows[chunk.kept], q.device), part)
        assert o is not None, "a sequence has tiles"
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, by_distance = ctx.saved_tensors
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        has_table = by_distance is not None and ctx.needs_input_grad[3]
        tables = [torch.zeros_like(by_distance)] if has_table else []
        kind, dtype, is_enabled = ctx.autocast
        devices = [q.device] if q.is_cuda else []
        with torch.random.fork_rng(devices, enabled=ctx.random is not None):
            if ctx.random is not None and q.is_cuda:
                torch.cuda.set_rng_state(ctx.random, q.device)
            elif ctx.random is not None:
                torch.set_rng_state(ctx.random)
            for chunk in ctx.work.chunks:
                q_rows, kv_rows = _on(chunk.q_rows, q.device), _on(chunk.kv_rows, q.device)
                rows = (q_rows, kv_rows, kv_rows)
                leaves = [x.index_select(0, index).requires_grad_() for x, index in zip((q, k, v), rows)]
                table = by_distance.detach().requires_grad_(has_table) if by_distance is not None else None
                with torch.enable_grad(), torch.autocast(kind, dtype, enabled=is_enabled):
                    part = ctx.work.attend(chunk, *leaves, table)
                grad_part = grad.index_select(0, _on(chunk.q_rows[chunk.kept], q.device))
                wanted = [*leaves, table] if has_table else leaves
                parts = torch.autograd.grad(part, wanted, grad_part)
                for total, index, gradient in zip(sums, rows, parts):
                    total.index_add_(0, index, gradient)
                for total, gradient in zip(tables, parts[3:]):
                    total += gradient
        return (*sums, tables[0] if has_table else None, None)


def _on(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x).to(device)


def scores_by_distance(bias: ScoreBias, length: int, device: torch.device) -> Float[Tensor, "H d"]:
    """`[H, 2 * length - 1]` the bias at each distance of key and query, from `1 - length` on.

    A bias is a function of the distance; so kernels that compute a few places need not call it for each.
    """
    i = torch.full((1, 1), length - 1, device=device)
    return bias.at(i, torch.arange(2 * length - 1, device=device)[None, :])[:, 0]
