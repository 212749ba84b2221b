"""Patterns of every kind, what a loop says of them, and a bias, for tests of kernels."""

import torch
from hypothesis import strategies as st

from meristem.model.config import (
    BlockSparse,
    Both,
    Causal,
    Dilated,
    Either,
    Full,
    GlobalTokens,
    InPrefix,
    Pattern,
    Window,
)
from meristem.model.patterns import random_blocks
from meristem.model.position import ScoreBias

sides = st.tuples(st.integers(0, 5), st.integers(0, 5))
single_patterns = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.just(InPrefix()),
    sides.map(lambda side: Window(left=side[0], right=side[1])),
    st.builds(
        lambda side, step: Dilated(left=side[0], right=side[1], step=step), side=sides, step=st.sampled_from([2, 3, 5])
    ),
    st.builds(GlobalTokens, count=st.integers(1, 4)),
    st.builds(
        BlockSparse,
        block=st.integers(1, 6),
        num_near=st.integers(0, 1),
        num_global=st.integers(0, 1),
        num_random=st.integers(0, 2),
        seed=st.integers(0, 2**32),
    ),
)
some_patterns = st.recursive(
    single_patterns,
    lambda part: st.tuples(part, part, st.booleans()).map(lambda x: x[0] & x[1] if x[2] else x[0] | x[1]),
    max_leaves=4,
)


def seen_by_loop(pattern: Pattern, i: int, j: int, length: int, prefix_length: int) -> bool:
    """Whether the query at `i` sees the key at `j`: the definitions, for a single pair."""
    match pattern:
        case Full():
            return True
        case Causal():
            return j <= i
        case Window():
            return j in range(i - pattern.left, i + pattern.right + 1)
        case Dilated():
            return j in [i + pattern.step * n for n in range(-pattern.left, pattern.right + 1)]
        case InPrefix():
            return j < prefix_length
        case GlobalTokens():
            return min(i, j) < pattern.count
        case BlockSparse():
            row, column = i // pattern.block, j // pattern.block
            drawn = random_blocks(pattern, -(-length // pattern.block))[row]
            is_near = abs(row - column) <= pattern.num_near
            return is_near or min(row, column) < pattern.num_global or column in drawn.tolist()
        case Both():
            return all(seen_by_loop(part, i, j, length, prefix_length) for part in pattern.parts)
        case Either():
            return any(seen_by_loop(part, i, j, length, prefix_length) for part in pattern.parts)
        case _:
            raise AssertionError(pattern)


def distance_bias(table: torch.Tensor) -> ScoreBias:
    """Any number for each head and distance, nearest at the ends of the table for those beyond it."""
    middle = table.shape[1] // 2
    return ScoreBias(lambda i, j: table[:, (j - i).clamp(-middle, middle) + middle], table.device)
