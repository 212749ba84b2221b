"""Attention under every pattern and a bias is the reference, on dense masks and on tiles, alone and among others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from flat import attend, attend_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import distance_bias, some_patterns
from torch.nn.attention.flex_attention import flex_attention

from meristem.model.config import BlockSparse, Causal, Dilated, Full, GlobalTokens, InPrefix, Pattern, Window
from meristem.model.kernels import Packed, Scoring, flex, grouped, tiles
from meristem.model.patterns import may_see
from meristem.types import Layout

Kernel = Callable[..., torch.Tensor]


@contextmanager
def small_tiles(tile: int = 4, rows_at_once: int = 24) -> Iterator[None]:
    """Everything that can runs on tiles, and on tiny ones, so that short sequences have many."""
    sizes = {"TILES": (tile,), "MIN_KEYS": 0, "MAX_DENSE_KEYS": 0, "ROWS_AT_ONCE": rows_at_once, "SPANS_AT_ONCE": 32}
    tiles.plan_tiles.cache_clear()
    with mock.patch.multiple(tiles, **sizes):
        yield
    tiles.plan_tiles.cache_clear()


class Case:
    """Queries, keys, values and perhaps a bias of ragged sequences; two heads a key head."""

    def __init__(self, seed: int, lengths: list[tuple[int, int, int]], has_bias: bool, width: int = 8):
        generator = torch.Generator().manual_seed(seed)
        prefixes = tuple(prefix for _, _, prefix in lengths)
        self.q_layout = replace(Layout.of([m for m, _, _ in lengths]), prefix_lengths=prefixes)
        self.kv_layout = replace(Layout.of([n for _, n, _ in lengths]), prefix_lengths=prefixes)
        shapes = [(self.q_layout.num_rows, 4, width), *[(self.kv_layout.num_rows, 2, width)] * 2]
        # scores of about 2, so that attention is neither flat nor one row
        self.leaves = [2**0.5 * torch.randn(shape, generator=generator) for shape in shapes]
        self.table = torch.randn(4, 61, generator=generator) if has_bias else None

    def results(self, kernel: Kernel, pattern: Pattern) -> list[torch.Tensor]:
        """Output, and gradients of all that went in; spare rows are computed and never read."""
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        table = [] if self.table is None else [self.table.clone().requires_grad_()]
        bias = distance_bias(table[0]) if table else None
        out = kernel(*leaves, self.q_layout, self.kv_layout, pattern, bias, 0.4)[: self.q_layout.num_tokens]
        weights = torch.linspace(-9, 9, out.numel()).view_as(out).cos()
        gradients = torch.autograd.grad((out * weights).sum(), [*leaves, *table])
        ends = [self.q_layout.num_tokens, *[self.kv_layout.num_tokens] * 2, None]
        return [out.detach(), *(gradient[:end] for gradient, end in zip(gradients, ends))]

    def check(self, kernel: Kernel, pattern: Pattern) -> None:
        wanted = self.results(lambda *args: attend_reference(*args)[0], pattern)
        for got, want in zip(self.results(kernel, pattern), wanted, strict=True):
            # sums of up to some hundred products in another order, in fp32; gradients of a bias sum over all pairs
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


ragged = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 9), st.integers(0, 9)).map(lambda x: (x[0], x[0] + x[1], x[2])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=ragged, pattern=some_patterns, has_bias=st.booleans(), more=st.booleans())
def test_every_pattern_equals_its_dense_mask_in_forward_and_gradient(
    seed: int, lengths: list[tuple[int, int, int]], pattern: Pattern, has_bias: bool, more: bool
) -> None:
    Case(seed, lengths * (1 + more), has_bias).check(attend, pattern)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=ragged,
    pattern=some_patterns,
    has_bias=st.booleans(),
    more=st.booleans(),
    tile=st.sampled_from([2, 4, 8]),
)
def test_every_pattern_on_tiles_equals_its_dense_mask_in_forward_and_gradient(
    seed: int, lengths: list[tuple[int, int, int]], pattern: Pattern, has_bias: bool, more: bool, tile: int
) -> None:
    with small_tiles(tile):
        Case(seed, lengths * (1 + more), has_bias).check(attend, pattern)


LONG = [
    Causal() & Window(left=40),
    Window(left=64, right=64),
    Window(left=16, right=16) | GlobalTokens(count=2),
    Causal() & Dilated(left=9, step=7),
    BlockSparse(block=16, num_random=1),
    Causal() | InPrefix(),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", LONG, ids=range(len(LONG)))
def test_long_sequences_equal_their_dense_mask_in_forward_and_gradient(
    pattern: Pattern, has_bias: bool, rng: np.random.Generator
) -> None:
    """Many times the window, at the sizes of tiles that are used."""
    lengths = [(n, n, 70) for n in (900, 900, int(rng.integers(257, 700)))]
    Case(int(rng.integers(2**31)), lengths, has_bias).check(attend, pattern)


def test_sequences_much_longer_than_their_window_run_on_tiles() -> None:
    """Or the test above would compare dense masks with dense masks."""
    for pattern in LONG[:5]:
        plan = tiles.plan_tiles(pattern, 900, 900, 70, False)
        assert plan is not None
        assert sum(keys.size for _, keys in plan.groups) < 0.5 * (900 / plan.tile + 1) ** 2
    assert tiles.plan_tiles(Full(), 90_000, 90_000, 0, False) is None
    assert tiles.plan_tiles(Causal(), 90_000, 90_000, 0, False) is None


def test_pairs_that_are_computed_grow_as_the_length_does() -> None:
    def pairs(pattern: Pattern, length: int) -> int:
        plan = tiles.plan_tiles(pattern, length, length, 0, False)
        assert plan is not None
        return sum(keys.size for _, keys in plan.groups) * plan.tile**2

    for pattern in (Causal() & Window(left=255), Window(left=500, right=500), BlockSparse(block=64)):
        # the first tiles see fewer, which counts less in a longer sequence
        assert pairs(pattern, 65_536) < 8.3 * pairs(pattern, 8192)


def dropped_tile(*args: object) -> tiles.TilePlan | None:
    """The mutant: the first tile of keys that a tile of queries sees is left out where there are two."""
    plan = tiles.plan_tiles(*args)
    assert plan is not None
    groups = [(queries, keys[:, int(keys.shape[1] > 1) :]) for queries, keys in plan.groups]
    return replace(plan, groups=tuple(groups))


def widened(pattern: Pattern, queries: tuple, keys: tuple, *rest: object) -> torch.Tensor:
    """The mutant: a window that is off by one, in the masks of tiles alone."""
    return may_see(pattern, (queries[0] + 1, queries[1] + 1), keys, *rest)


@pytest.mark.parametrize(
    ("module", "name", "mutant"), [(grouped, "plan_tiles", dropped_tile), (tiles, "may_see", widened)]
)
def test_a_dropped_tile_and_a_window_off_by_one_are_caught(
    module: object, name: str, mutant: Kernel, rng: np.random.Generator
) -> None:
    case = Case(int(rng.integers(2**31)), [(400, 400, 0)], has_bias=False)
    case.check(attend, Causal() & Window(left=40))
    with mock.patch.object(module, name, mutant), pytest.raises(AssertionError, match="not close"):
        case.check(attend, Causal() & Window(left=40))


@pytest.mark.parametrize("mutant", [BlockSparse(block=16, seed=1), BlockSparse(block=16, num_random=2)])
def test_wrong_random_blocks_are_caught(mutant: Pattern, rng: np.random.Generator) -> None:
    case = Case(int(rng.integers(2**31)), [(300, 300, 0)], has_bias=False)
    with pytest.raises(AssertionError, match="not close"):
        case.check(lambda *args: attend(*args[:5], mutant, *args[6:]), BlockSparse(block=16))


def test_a_bias_that_is_left_out_is_caught(rng: np.random.Generator) -> None:
    case = Case(int(rng.integers(2**31)), [(300, 300, 0)], has_bias=True)
    with pytest.raises((AssertionError, RuntimeError)):
        case.check(lambda *args: attend(*args[:6]), Window(left=9))


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient() -> None:
    case = Case(0, [(9, 9, 0), (300, 300, 0), (400, 400, 3)], has_bias=False)
    out, *gradients = case.results(attend, InPrefix())
    assert not out[:309].any()
    assert out[309:].all()
    for gradient in gradients:
        assert not gradient[:309].any()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("width", [6, 32])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", [*LONG, Full()], ids=range(len(LONG) + 1))
def test_a_sequence_gives_the_bits_it_gives_among_others(
    pattern: Pattern, has_bias: bool, width: int, rng: np.random.Generator
) -> None:
    short = rng.integers(1, 60, 4).tolist()
    lengths = [(int(n), int(n), int(rng.integers(0, n + 1))) for n in sorted([*short, 300, 300, 420, 700])]
    case = Case(int(rng.integers(2**31)), lengths, has_bias, width)
    bias = distance_bias(case.table) if case.table is not None else None
    layout = case.q_layout
    with torch.inference_mode():
        together = attend(*case.leaves, layout, layout, pattern, bias)
        for index, (start, length) in enumerate(zip(layout.starts, layout.lengths)):
            rows = slice(start, start + length)
            alone = Layout((length,), prefix_lengths=layout.prefix_lengths[index : index + 1])
            got = attend(*(x[rows] for x in case.leaves), alone, alone, pattern, bias)
            assert torch.equal(got, together[rows])


def test_weights_can_be_had_under_any_pattern_and_bias(rng: np.random.Generator) -> None:
    case = Case(int(rng.integers(2**31)), [(20, 20, 4), (12, 12, 2)], has_bias=True)
    bias = distance_bias(case.table)
    pattern = (Causal() & Window(left=4)) | InPrefix()
    q, k, v = case.leaves
    out, weights = attend_reference(q, k, v, case.q_layout, case.kv_layout, pattern, bias)
    assert [tuple(map_Hmn.shape) for map_Hmn in weights] == [(4, 20, 20), (4, 12, 12)]
    assert not weights[0][:, 10, 4:6].any()
    assert weights[0][:, 10, 6:11].all()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 20), atol=1e-6, rtol=0)  # fp32 sums of 20
    mixed = torch.einsum("hmn,nhe->mhe", weights[1], v[20:32].repeat_interleave(2, 1))
    torch.testing.assert_close(out[20:32], mixed, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", [*LONG, Causal()], ids=range(len(LONG) + 1))
def test_kernels_on_cuda_equal_the_reference(pattern: Pattern, has_bias: bool, rng: np.random.Generator) -> None:
    """In bf16: variable-length attention for windows without a bias, FlexAttention for all else."""
    lengths = [(int(n), int(n), min(int(n), 30)) for n in rng.integers(1, 400, 5)]
    case = Case(int(rng.integers(2**31)), lengths, has_bias, 32)
    device = torch.device("cuda")
    layout = case.q_layout.to(device)
    exact = [x.to(device).bfloat16().float() for x in case.leaves]
    bias = distance_bias(case.table.to(device)) if case.table is not None else None
    wanted = attend_reference(*exact, layout, layout, pattern, bias)[0]
    got = attend(*(x.bfloat16() for x in exact), layout, layout, pattern, bias)
    rows = slice(0, layout.num_tokens)
    # bf16 keeps 8 bits
    torch.testing.assert_close(got.float()[rows], wanted[rows], atol=6e-2, rtol=5e-2)


def test_dropout_on_tiles_drops_the_same_weights_in_its_gradient(rng: np.random.Generator) -> None:
    """The backward pass computes anew what the forward pass dropped: the gradient is that of a linear function of v."""
    case = Case(int(rng.integers(2**31)), [(300, 300, 0)], has_bias=False)
    q, k, v = case.leaves
    v.requires_grad_()
    out = attend(q, k, v, case.q_layout, case.kv_layout, Window(left=30), None, None, 0.5)
    weights = torch.randn_like(out)
    before = torch.get_rng_state()
    [gradient] = torch.autograd.grad((out * weights).sum(), [v])
    assert torch.equal(torch.get_rng_state(), before), "the backward pass leaves the generator as it was"
    # out is linear in v, so <gradient, v> = <weights, out>; fp32 sums of 10,000 products
    torch.testing.assert_close((gradient * v).sum(), (out * weights).sum(), atol=1e-2, rtol=1e-3)
    kept = attend(q, k, v, case.q_layout, case.kv_layout, Window(left=30))
    assert not torch.allclose(out, kept, atol=0.1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pattern", LONG, ids=range(len(LONG)))
def test_flex_attention_not_compiled_equals_the_reference(
    pattern: Pattern, has_bias: bool, rng: np.random.Generator
) -> None:
    """What a GPU compiles runs slowly on a CPU, too: masks, biases and layouts are those of the pack."""
    lengths = [(int(m), int(m + more), 9) for m, more in zip(rng.integers(1, 60, 4), rng.integers(0, 9, 4))]
    case = Case(int(rng.integers(2**31)), lengths, has_bias, 16)
    q_layout, kv_layout = case.q_layout, case.kv_layout
    bias = distance_bias(case.table) if case.table is not None else None
    with torch.no_grad(), mock.patch.object(flex, "_compiled_attention", return_value=flex_attention):
        got = flex.attend_flex(Packed(*case.leaves, q_layout, kv_layout), Scoring(pattern, bias, 0.4))
    wanted, _ = attend_reference(*case.leaves, q_layout, kv_layout, pattern, bias, 0.4)
    rows = slice(0, q_layout.num_tokens)
    # sums of at most 70 products in another order, in fp32
    torch.testing.assert_close(got[rows], wanted[rows], atol=2e-5, rtol=1e-4)
