"""Masks of patterns are what the patterns say, for single places, for tiles, and as FlexAttention asks for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import distance_bias, seen_by_loop, some_patterns
from torch.nn.attention.flex_attention import create_mask

from meristem.model.config import (
    BlockSparse,
    Both,
    Causal,
    Dilated,
    Full,
    GlobalTokens,
    InPrefix,
    Pattern,
    Window,
)
from meristem.model.kernels.flex import mask_function, score_function
from meristem.model.patterns import (
    Sequence,
    left_reach,
    may_see,
    parts_of,
    random_blocks,
    visible,
    window_of,
)
from meristem.types import Layout


def dense(pattern: Pattern, q_length: int, kv_length: int, prefix_length: int) -> torch.Tensor:
    return visible(pattern, q_length, kv_length, prefix_length, torch.device("cpu"))


def check(pattern: Pattern, mask: torch.Tensor, kv_length: int, prefix_length: int) -> None:
    """The mask is what a loop over pairs of places says."""
    for row, i in enumerate(range(kv_length - len(mask), kv_length)):
        for j in range(kv_length):
            assert mask[row, j] == seen_by_loop(pattern, i, j, kv_length, prefix_length), (i, j)


@settings(max_examples=150, deadline=None)
@given(
    pattern=some_patterns, kv_length=st.integers(1, 24), missing=st.integers(0, 23), prefix_length=st.integers(0, 12)
)
def test_a_mask_is_what_a_loop_over_places_says(
    pattern: Pattern, kv_length: int, missing: int, prefix_length: int
) -> None:
    q_length = max(1, kv_length - missing)
    check(pattern, dense(pattern, q_length, kv_length, prefix_length), kv_length, prefix_length)


BLOCKS = BlockSparse(block=2, num_near=0, num_global=1, num_random=2)
MUTANTS = {
    "a window one too wide": (Window(left=3, right=2), Window(left=4, right=2)),
    "a window one too narrow behind": (Window(left=3, right=2), Window(left=3, right=1)),
    "a leaked future": (Causal() & Window(left=3, right=2), Window(left=3, right=2)),
    "a step forgotten": (Dilated(left=3, step=2), Window(left=6)),
    "a global token too many": (Window(left=1) | GlobalTokens(count=1), Window(left=1) | GlobalTokens(count=2)),
    "or for and": (Causal() & InPrefix(), Causal() | InPrefix()),
    "other random blocks": (BLOCKS, replace(BLOCKS, seed=1)),
    "a block too near": (BLOCKS, replace(BLOCKS, num_near=1)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mask_that_is_another_patterns_is_caught(name: str) -> None:
    pattern, mutant = MUTANTS[name]
    check(pattern, dense(pattern, 20, 20, 7), 20, 7)
    with pytest.raises(AssertionError):
        check(pattern, dense(mutant, 20, 20, 7), 20, 7)


@settings(max_examples=150, deadline=None)
@given(
    pattern=some_patterns,
    num_queries=st.integers(1, 9),
    num_keys=st.integers(1, 9),
    kv_length=st.integers(1, 40),
    prefix_length=st.integers(0, 12),
)
def test_tiles_see_each_other_where_some_of_their_places_do(
    pattern: Pattern, num_queries: int, num_keys: int, kv_length: int, prefix_length: int
) -> None:
    sequence = Sequence.of(pattern, kv_length, prefix_length, torch.device("cpu"))
    i, j = torch.arange(0, kv_length, num_queries)[:, None], torch.arange(0, kv_length, num_keys)[None, :]
    ends = ((x + n - 1).clamp(max=kv_length - 1) for x, n in ((i, num_queries), (j, num_keys)))
    i_last, j_last = ends
    got = may_see(pattern, (i, i_last), (j, j_last), sequence, num_queries).expand(len(i), j.shape[1])
    mask = dense(pattern, kv_length, kv_length, prefix_length)
    for row, column in np.ndindex(*got.shape):
        wanted = mask[i[row, 0] : i_last[row, 0] + 1, j[0, column] : j_last[0, column] + 1].any()
        assert got[row, column] or not wanted, "a tile that is seen is left out"
        if not any(isinstance(part, Both) for part in nodes(pattern)):
            assert got[row, column] == wanted, "a tile that is not seen is computed"


def nodes(pattern: Pattern) -> list[Pattern]:
    return [pattern, *(node for part in getattr(pattern, "parts", ()) for node in nodes(part))]


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 30),
    num_near=st.integers(0, 3),
    num_global=st.integers(0, 3),
    num_random=st.integers(0, 5),
    seed=st.integers(-5, 2**40),
)
def test_random_blocks_are_others_than_near_and_global_ones_and_differ(
    num_blocks: int, num_near: int, num_global: int, num_random: int, seed: int
) -> None:
    pattern = BlockSparse(block=4, num_near=num_near, num_global=num_global, num_random=num_random, seed=seed)
    drawn = random_blocks(pattern, num_blocks)
    assert drawn.shape == (num_blocks, num_random)
    for row in range(num_blocks):
        others = set(range(num_global, num_blocks)) - set(range(row - num_near, row + num_near + 1))
        picked = [int(block) for block in drawn[row] if block >= 0]
        assert len(set(picked)) == len(picked) == min(num_random, len(others))
        assert set(picked) <= others


def test_every_other_block_is_drawn_as_often() -> None:
    counts = np.zeros(12)
    for seed in range(2000):
        blocks = random_blocks(BlockSparse(block=1, num_near=1, num_global=2, num_random=3, seed=seed), 12)[6]
        counts[blocks] += 1
    others = [2, 3, 4, 8, 9, 10, 11]
    assert counts[others].sum() == counts.sum() == 6000
    # 2000 draws of 3 in 7 have a deviation of 22; five of those
    assert np.abs(counts[others] - 6000 / 7).max() < 111


def test_random_blocks_are_the_same_on_every_machine() -> None:
    """Pinned: models that were trained with these see the same keys wherever they run."""
    assert random_blocks(BlockSparse(block=64, num_random=2, seed=3), 8).tolist() == PINNED
    assert random_blocks(BlockSparse(block=16, num_random=2, seed=3), 8).tolist() == PINNED
    assert random_blocks(BlockSparse(block=64, num_random=2, seed=4), 8).tolist() != PINNED
    assert random_blocks(BlockSparse(block=64, num_random=2, seed=3), 9)[:8].tolist() != PINNED


PINNED = [[4, 6], [4, 7], [4, 7], [1, 7], [1, 7], [2, 1], [1, 2], [3, 4]]


@settings(max_examples=100, deadline=None)
@given(pattern=some_patterns, kv_length=st.integers(1, 20), prefix_length=st.integers(0, 9))
def test_what_is_said_of_a_whole_pattern_holds_for_its_mask(
    pattern: Pattern, kv_length: int, prefix_length: int
) -> None:
    mask = dense(pattern, kv_length, kv_length, prefix_length)
    distance = torch.arange(kv_length)[None, :] - torch.arange(kv_length)[:, None]
    reach = left_reach(pattern)
    assert reach is None or not mask[distance < -reach].any()
    window = window_of(pattern)
    if window is not None:
        left, right = (kv_length if side < 0 else side for side in window)
        assert torch.equal(mask, (distance >= -left) & (distance <= right))


def test_windows_are_known_for_what_they_are() -> None:
    assert window_of(Full()) == (-1, -1)
    assert window_of(Causal() & Window(left=255, right=9)) == (255, 0)
    assert window_of(Window(left=4, right=4) & Full()) == (4, 4)
    assert window_of(Causal() | InPrefix()) is None
    assert window_of(Causal() & Dilated(left=4)) is None
    assert left_reach(Causal() & (Dilated(left=4, step=3) | Window(left=5))) == 12
    assert left_reach(Causal() | Window(left=5)) is None


lengths_of_two_sides = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair))), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(pattern=some_patterns, lengths=lengths_of_two_sides, prefix_length=st.integers(0, 6))
def test_the_mask_of_a_pack_that_flex_attention_asks_for_is_that_of_its_sequences(
    pattern: Pattern, lengths: list[tuple[int, int]], prefix_length: int
) -> None:
    prefixes = tuple(min(prefix_length, n) for _, n in lengths)
    q_layout = Layout(tuple(m for m, _ in lengths), 2, prefix_lengths=prefixes)
    kv_layout = Layout(tuple(n for _, n in lengths), 3, prefix_lengths=prefixes)
    sees = mask_function(pattern, q_layout, kv_layout)
    got = create_mask(sees, None, None, q_layout.num_rows, kv_layout.num_rows, device="cpu")[0, 0]
    wanted = torch.zeros_like(got)
    sides = zip(q_layout.starts, q_layout.segments, kv_layout.starts, kv_layout.segments, kv_layout.segment_prefixes)
    for q_start, m, kv_start, n, prefix in sides:
        wanted[q_start : q_start + m, kv_start : kv_start + n] = dense(pattern, m, n, prefix)
    assert torch.equal(got, wanted)


def test_a_flex_mask_that_leaks_into_the_next_sequence_is_caught() -> None:
    """The mutant: two sequences as one. The mask of the pack must differ, or the test above shows nothing."""
    apart, together = Layout((5, 7)), Layout((12,))
    masks = [
        create_mask(mask_function(Full(), layout, layout), None, None, 12, 12, device="cpu")
        for layout in (apart, together)
    ]
    assert not torch.equal(*masks)


def test_the_bias_that_flex_attention_asks_for_is_that_of_each_sequence(rng: np.random.Generator) -> None:
    bias = distance_bias(torch.randn(3, 81))
    layout, kv_layout = Layout((5, 9)), Layout((8, 12))
    scored = score_function(bias, layout, kv_layout)
    b = torch.zeros((), dtype=torch.long)
    for q_start, m, kv_start, n in ((0, 5, 0, 8), (5, 9, 8, 12)):
        wanted = bias.over(m, n)
        for head, row, column in np.ndindex(3, m, n):
            at = (torch.tensor(x) for x in (head, q_start + row, kv_start + column))
            assert scored(torch.tensor(0.5), b, *at) == 0.5 + wanted[head, row, column]


def test_parts_of_a_combination_are_all_of_its_patterns() -> None:
    pattern = Causal() & (Window(left=3) | (GlobalTokens(count=1) & InPrefix()))
    assert parts_of(pattern) == [Causal(), Window(left=3), GlobalTokens(count=1), InPrefix()]
