"""Attention to keys that are kept equals attention to all of them at once, bit for bit alone and among others."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from flat import attend_cached, attend_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import distance_bias, some_patterns

from meristem.model.config import Causal, Dilated, Full, InPrefix, Pattern, Window
from meristem.model.kernels import Scoring, Slotted, cached
from meristem.types import Layout

# new tokens, keys and prefix of each sequence
Lengths = list[tuple[int, int, int]]


class Kept:
    """Queries of new tokens, packed, and slots of keys and values that hold other numbers past their end."""

    def __init__(self, seed: int, lengths: Lengths, has_bias: bool = False, width: int = 8, capacity: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        prefixes = tuple(prefix for _, _, prefix in lengths)
        self.q_layout = replace(Layout.of([m for m, _, _ in lengths]), prefix_lengths=prefixes)
        self.kv_lengths = [n for _, n, _ in lengths]
        capacity = capacity or max(self.kv_lengths) + 3
        self.q = 2**0.5 * torch.randn(self.q_layout.num_rows, 4, width, generator=generator)
        self.k, self.v = (2**0.5 * torch.randn(len(lengths), capacity, 2, width, generator=generator) for _ in range(2))
        self.bias = distance_bias(torch.randn(4, 41, generator=generator)) if has_bias else None

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, Layout]:
        """Keys and values end to end, as the reference takes them."""
        rows = [(slot, slice(0, n)) for slot, n in enumerate(self.kv_lengths)]
        k, v = (torch.cat([x[row] for row in rows]) for x in (self.k, self.v))
        return k, v, Layout(tuple(self.kv_lengths), prefix_lengths=self.q_layout.prefix_lengths)

    def check(self, pattern: Pattern, scale: float | None = None) -> None:
        k, v, kv_layout = self.packed()
        num_tokens = self.q_layout.num_tokens
        q_layout = replace(self.q_layout, num_spare=0)
        wanted, _ = attend_reference(self.q[:num_tokens], k, v, q_layout, kv_layout, pattern, self.bias, scale)
        got = attend_cached(self.q, self.k, self.v, self.q_layout, self.kv_lengths, pattern, self.bias, scale)
        assert got.shape == self.q.shape
        # sums of at most some hundred products in another order, in fp32
        torch.testing.assert_close(got[:num_tokens], wanted, atol=2e-5, rtol=1e-5)


ragged = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 30), st.integers(0, 9)).map(lambda x: (x[0], x[0] + x[1], x[2])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=ragged, pattern=some_patterns, has_bias=st.booleans())
def test_new_tokens_attend_to_kept_keys_as_the_reference_does(
    seed: int, lengths: Lengths, pattern: Pattern, has_bias: bool
) -> None:
    Kept(seed, lengths, has_bias).check(pattern)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    pattern=some_patterns,
    has_bias=st.booleans(),
)
def test_one_new_token_a_sequence_attends_as_the_reference_does(
    seed: int, lengths: list[int], pattern: Pattern, has_bias: bool
) -> None:
    Kept(seed, [(1, n, 2) for n in lengths], has_bias).check(pattern, scale=0.3)


def test_long_prefills_in_pieces_attend_as_the_reference_does(rng: np.random.Generator) -> None:
    for pattern in (Causal() & Window(left=40), Causal(), Causal() | InPrefix()):
        Kept(int(rng.integers(2**31)), [(200, 700, 30), (90, 90, 20), (1, 300, 10)]).check(pattern)


PATTERNS = [Full(), Causal(), Causal() & Window(left=20), Causal() & Dilated(left=5, step=3), Causal() | InPrefix()]


@pytest.mark.parametrize("width", [6, 32])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_a_sequence_gives_the_bits_it_gives_among_others(
    pattern: Pattern, has_bias: bool, width: int, rng: np.random.Generator
) -> None:
    """Whatever the slot, its room, and the lengths of the others."""
    lengths = [(int(m), int(m + more), 5) for m, more in zip(rng.integers(1, 9, 7), rng.integers(0, 200, 7))]
    lengths += [(1, int(n), 5) for n in rng.integers(1, 200, 7)]
    kept = Kept(int(rng.integers(2**31)), lengths, has_bias, width)
    with torch.inference_mode():
        together = attend_cached(kept.q, kept.k, kept.v, kept.q_layout, kept.kv_lengths, pattern, kept.bias)
        for slot, (m, n, prefix) in enumerate(lengths):
            rows = slice(kept.q_layout.starts[slot], kept.q_layout.starts[slot] + m)
            alone = Layout((m,), prefix_lengths=(prefix,))
            k, v = (x[slot : slot + 1, : n + slot].clone() for x in (kept.k, kept.v))
            assert torch.equal(attend_cached(kept.q[rows], k, v, alone, [n], pattern, kept.bias), together[rows])


def test_slots_may_lie_in_any_order_and_between_those_of_nobody(rng: np.random.Generator) -> None:
    kept = Kept(int(rng.integers(2**31)), [(1, 30, 0), (3, 9, 0), (0, 12, 0), (1, 5, 0)])
    wanted = attend_cached(kept.q, kept.k, kept.v, kept.q_layout, kept.kv_lengths, Causal())
    slots = rng.permutation(6)[:4].tolist()
    k, v = (torch.full((6, *x.shape[1:]), torch.nan) for x in (kept.k, kept.v))
    k[slots], v[slots] = kept.k, kept.v
    got = attend_cached(kept.q, k, v, kept.q_layout, kept.kv_lengths, Causal(), slots=slots)
    assert torch.equal(got, wanted)


def test_a_windows_far_keys_are_not_read(rng: np.random.Generator) -> None:
    """They may be anything: a slot whose far past is not a number gives the same."""
    kept = Kept(int(rng.integers(2**31)), [(1, 300, 0), (2, 200, 0)])
    pattern = Causal() & Window(left=20)
    args = (kept.q_layout, kept.kv_lengths, pattern)
    wanted = attend_cached(kept.q, kept.k, kept.v, *args)
    kept.k[:, :178], kept.v[:, :178] = torch.nan, torch.nan
    assert torch.equal(attend_cached(kept.q, kept.k, kept.v, *args), wanted)


def test_a_reach_that_is_one_too_short_and_a_leaked_future_are_caught(rng: np.random.Generator) -> None:
    kept = Kept(int(rng.integers(2**31)), [(1, 60, 0), (3, 50, 0)])
    kept.check(Causal() & Window(left=5))
    with mock.patch.object(cached, "left_reach", return_value=4), pytest.raises(AssertionError, match="not close"):
        kept.check(Causal() & Window(left=5))
    full = mock.patch.object(
        cached, "visible", lambda pattern, m, n, *rest: torch.ones(m, n - rest[-1], dtype=torch.bool)
    )
    with full, pytest.raises(AssertionError, match="not close"):
        kept.check(Causal())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=ragged, pattern=some_patterns, has_bias=st.booleans())
def test_one_padded_call_attends_as_the_reference_does(
    seed: int, lengths: Lengths, pattern: Pattern, has_bias: bool
) -> None:
    """The way of a GPU where the variable-length kernel does not know a pattern; it runs anywhere."""
    if not any(m for m, _, _ in lengths):
        lengths = [(1, *lengths[0][1:])]

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, n: list[int], *rest: object):
        return cached._attend_padded(Slotted(q, k, v, layout, tuple(n), list(range(len(n)))), Scoring(*rest))

    with mock.patch(f"{__name__}.attend_cached", padded):
        Kept(seed, lengths, has_bias).check(pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_slots_on_cuda_equal_the_reference(pattern: Pattern, has_bias: bool, rng: np.random.Generator) -> None:
    lengths = [(int(m), int(m + more), 5) for m, more in zip(rng.integers(1, 9, 6), rng.integers(0, 200, 6))]
    kept = Kept(int(rng.integers(2**31)), lengths, has_bias, 32)
    k, v, kv_layout = kept.packed()
    half = [x.bfloat16() for x in (kept.q, k, v)]
    num_tokens = kept.q_layout.num_tokens
    q_layout = replace(kept.q_layout, num_spare=0)
    exact = [half[0].float()[:num_tokens], half[1].float(), half[2].float()]
    wanted, _ = attend_reference(*exact, q_layout, kv_layout, pattern, kept.bias)
    device = torch.device("cuda")
    bias = distance_bias(kept.bias.table.to(device)) if kept.bias is not None else None
    slots = [x.to(device).bfloat16() for x in (kept.q, kept.k, kept.v)]
    with torch.inference_mode():
        got = attend_cached(*slots, kept.q_layout.to(device), kept.kv_lengths, pattern, bias)
    # bf16 keeps 8 bits
    torch.testing.assert_close(got.float().cpu()[:num_tokens], wanted, atol=6e-2, rtol=5e-2)
