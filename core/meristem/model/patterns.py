"""Masks of attention patterns: which keys a query may see.

One function, `may_see`, says for places of queries and keys within a sequence whether the query sees the key. It takes
spans of places; a single place is a span of one. So the reference kernel evaluates it densely, FlexAttention compiles
it, and the kernel of tiles asks of whole tiles at once which of them see each other.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch

from meristem.model.config import BlockSparse, Pattern
from meristem.model.config import pattern as kinds
from meristem.shapes import Bool, Tensor

Span = tuple[Tensor, Tensor]
"""First and last places of spans, both included."""


def visible(
    pattern: Pattern, q_length: int, kv_length: int, prefix_length: int, device: torch.device, first: int = 0
) -> Bool[Tensor, "m n"]:
    """Which keys, from the place `first` on, the last `q_length` places of a sequence see.

    Places count from the first of `kv_length` keys. Where there are more queries than keys, as across two sides, the
    first of them stand before 0.
    """
    i = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    j = torch.arange(first, kv_length, device=device)[None, :]
    seen = may_see(pattern, (i, i), (j, j), Sequence.of(pattern, kv_length, prefix_length, device))
    return seen.broadcast_to(i.shape[0], j.shape[1])


@dataclass(frozen=True)
class Sequence:
    """What a mask depends on besides places.

    Attributes:
        prefix_length: length of the prefix; for several sequences, a tensor that broadcasts against the places.
        drawn: for a pattern, blocks of queries and a number n, the n-th random block of each; -1 where there is none.
    """

    prefix_length: int | Tensor
    drawn: Callable[[BlockSparse, Tensor, int], Tensor]

    @classmethod
    def of(cls, pattern: Pattern, length: int, prefix_length: int, device: torch.device) -> "Sequence":
        """Of one sequence with `length` keys."""
        tables = {
            part: torch.from_numpy(random_blocks(part, max(1, -(-length // part.block)))).to(device)
            for part in parts_of(pattern)
            if isinstance(part, BlockSparse)
        }
        return cls(prefix_length, lambda part, blocks, pick: tables[part][blocks, pick])


def may_see(
    pattern: Pattern, queries: Span, keys: Span, sequence: Sequence, num_queries: int = 1
) -> Bool[Tensor, "..."]:
    """Whether any query of a span may see any key of a span.

    Exact for spans of one place, and for any part of a pattern that is not made by `&`, whose parts may be
    visible to different queries of a span. The result has the shape that the places broadcast to, or one that
    broadcasts to it.

    Args:
        queries, keys: first and last places of the spans, broadcast against each other.
        num_queries: largest number of places in a span of queries.
    """
    (i, i_last), (j, j_last) = queries, keys
    match pattern:
        case kinds.Full():
            return torch.ones_like(j, dtype=torch.bool)
        case kinds.Causal():
            return j <= i_last
        case kinds.Window():
            return (j_last >= i - pattern.left) & (j <= i_last + pattern.right)
        case kinds.Dilated():  # whether the distances between hold a multiple of the step
            nearest = (j - i_last).clamp(min=-pattern.left * pattern.step)
            farthest = (j_last - i).clamp(max=pattern.right * pattern.step)
            return farthest // pattern.step * pattern.step >= nearest
        case kinds.InPrefix():
            return j < sequence.prefix_length
        case kinds.GlobalTokens():
            return (i < pattern.count) | (j < pattern.count)
        case BlockSparse():
            return _blocks_see(pattern, queries, keys, sequence, num_queries)
        case kinds.Both():
            return reduce(operator.and_, (may_see(p, queries, keys, sequence, num_queries) for p in pattern.parts))
        case kinds.Either():
            return reduce(operator.or_, (may_see(p, queries, keys, sequence, num_queries) for p in pattern.parts))
        case _:
            raise AssertionError(pattern)


def _blocks_see(
    pattern: BlockSparse, queries: Span, keys: Span, sequence: Sequence, num_queries: int
) -> Bool[Tensor, "..."]:
    """As `may_see`, in blocks; the drawn ones are looked up for each block that a span of queries touches."""
    row, last_row, column, last_column = (place // pattern.block for place in (*queries, *keys))
    seen = (last_column >= row - pattern.num_near) & (column <= last_row + pattern.num_near)
    seen = seen | (row < pattern.num_global) | (column < pattern.num_global)
    for step in range((num_queries + pattern.block - 2) // pattern.block + 1):
        touched = torch.minimum(row + step, last_row).clamp(min=0)
        for pick in range(pattern.num_random):
            drawn = sequence.drawn(pattern, touched, pick)
            seen = seen | ((column <= drawn) & (drawn <= last_column))
    return seen


@lru_cache(maxsize=64)
def random_blocks(pattern: BlockSparse, num_blocks: int) -> np.ndarray:
    """`[num_blocks, num_random]` blocks of keys drawn for each block of queries, -1 where none are left.

    Drawn without repetition (Floyd's way) among those that are neither near nor global. A function of the seed and
    of the number of blocks alone: it uses raw numbers of a counter-based generator, which are the same everywhere.
    """
    rows = np.arange(num_blocks)
    first_near = np.maximum(rows - pattern.num_near, min(pattern.num_global, num_blocks))
    num_near = np.maximum(np.minimum(rows + pattern.num_near + 1, num_blocks) - first_near, 0)
    num_others = num_blocks - min(pattern.num_global, num_blocks) - num_near
    key = np.array([pattern.seed % 2**64, num_blocks], np.uint64)
    raw = np.random.Philox(key=key).random_raw((num_blocks, max(pattern.num_random, 1)))
    drawn = np.full((num_blocks, pattern.num_random), -1, np.int64)
    for pick in range(pattern.num_random):
        last = num_others - pattern.num_random + pick
        number = (raw[:, pick] % np.maximum(last + 1, 1).astype(np.uint64)).astype(np.int64)
        is_taken = (drawn[:, :pick] == number[:, None]).any(1)
        drawn[:, pick] = np.where(last < 0, -1, np.where(is_taken, last, number))
    # from numbers among the others to blocks
    blocks = drawn + min(pattern.num_global, num_blocks)
    blocks += np.where(blocks >= first_near[:, None], num_near[:, None], 0)
    return np.where(drawn < 0, -1, blocks)


def parts_of(pattern: Pattern) -> list[Pattern]:
    """The patterns that a combination is made of."""
    if isinstance(pattern, kinds.Both | kinds.Either):
        return [part for combined in pattern.parts for part in parts_of(combined)]
    return [pattern]


def has_prefix(pattern: Pattern) -> bool:
    """Whether the mask depends on the prefix of a sequence."""
    return any(isinstance(part, kinds.InPrefix) for part in parts_of(pattern))


def is_relative(pattern: Pattern) -> bool:
    """Whether the mask depends on the distance of query and key alone."""
    return all(isinstance(part, kinds.Full | kinds.Causal | kinds.Window | kinds.Dilated) for part in parts_of(pattern))


def window_of(pattern: Pattern) -> tuple[int, int] | None:
    """Keys seen before and behind a query, -1 for all of them; None where the pattern is not such a window."""
    match pattern:
        case kinds.Full():
            return -1, -1
        case kinds.Causal():
            return -1, 0
        case kinds.Window():
            return pattern.left, pattern.right
        case kinds.Both():
            windows = [window_of(part) for part in pattern.parts]
            known = [window for window in windows if window is not None]
            if len(known) < len(windows):
                return None
            left, right = (min((n for n in side if n >= 0), default=-1) for side in zip(*known))
            return left, right
        case _:
            return None


def left_reach(pattern: Pattern) -> int | None:
    """How far before a query its first key may be; None where there is no bound."""
    match pattern:
        case kinds.Window():
            return pattern.left
        case kinds.Dilated():
            return pattern.left * pattern.step
        case kinds.Both():
            return min((n for n in map(left_reach, pattern.parts) if n is not None), default=None)
        case kinds.Either():
            reaches = [left_reach(part) for part in pattern.parts]
            known = [reach for reach in reaches if reach is not None]
            return max(known) if len(known) == len(reaches) else None
        case _:
            return None
