"""Packed attention is the reference kernel, whatever the lengths, the heads and the two layouts."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flat import attend, attend_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.model.config import Causal, Full, Pattern
from meristem.model.kernels import grouped
from meristem.types import Layout

Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout, Layout]


def make(
    seed: int, lengths: list[tuple[int, int]], num_kv_heads: int, share: int, head_width: int, device: str = "cpu"
) -> Made:
    """Queries, keys and values of two sides; sequence i has `lengths[i]` = (queries, keys)."""
    generator = torch.Generator().manual_seed(seed)
    q_layout = Layout.of([m for m, _ in lengths]).to(torch.device(device))
    kv_layout = Layout.of([n for _, n in lengths]).to(torch.device(device))
    shapes = [
        (q_layout.num_rows, num_kv_heads * share, head_width),
        (kv_layout.num_rows, num_kv_heads, head_width),
        (kv_layout.num_rows, num_kv_heads, head_width),
    ]
    # scores of about 2, so that attention is neither flat nor one row
    tensors = [2**0.5 * torch.randn(shape, generator=generator) for shape in shapes]
    return (*tensors, q_layout, kv_layout)


Kernel = Callable[..., torch.Tensor]


def results(kernel: Kernel, made: Made, pattern: Pattern) -> list[torch.Tensor]:
    """Output and gradients; spare rows are computed and never read."""
    *leaves, q_layout, kv_layout = made
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = kernel(*leaves, q_layout, kv_layout, pattern)[: q_layout.num_tokens]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out).cos()
    gradients = torch.autograd.grad((out * weights).sum(), leaves)
    ends = [q_layout.num_tokens, kv_layout.num_tokens, kv_layout.num_tokens]
    return [out.detach(), *(gradient[:end] for gradient, end in zip(gradients, ends))]


def reference(*args: object) -> torch.Tensor:
    return attend_reference(*args)[0]


# a causal query must see a key, so its side is not the longer one
causal_sides = st.tuples(st.integers(1, 20), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))
full_sides = st.tuples(st.integers(1, 30), st.integers(1, 30))
sides_and_pattern = st.one_of(
    st.tuples(st.lists(causal_sides, min_size=1, max_size=6), st.just(Causal())),
    st.tuples(st.lists(full_sides, min_size=1, max_size=6), st.just(Full())),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([1, 2, 4]),
    head_width=st.sampled_from([8, 16, 24, 32]),
    pattern=st.sampled_from([Full(), Causal()]),
)
def test_packed_self_attention_equals_the_reference_in_forward_and_gradient(
    seed: int, lengths: list[int], num_kv_heads: int, share: int, head_width: int, pattern: Pattern
) -> None:
    made = make(seed, [(n, n) for n in lengths], num_kv_heads, share, head_width)
    for got, wanted in zip(results(attend, made, pattern), results(reference, made, pattern), strict=True):
        # sums of at most 24 products in another order, in fp32
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sides=sides_and_pattern,
    num_kv_heads=st.sampled_from([1, 2]),
    share=st.sampled_from([1, 3]),
    head_width=st.sampled_from([8, 16, 24, 32]),
)
def test_queries_and_keys_of_different_lengths_equal_the_reference_in_forward_and_gradient(
    seed: int, sides: tuple[list[tuple[int, int]], Pattern], num_kv_heads: int, share: int, head_width: int
) -> None:
    lengths, pattern = sides
    made = make(seed, lengths, num_kv_heads, share, head_width)
    for got, wanted in zip(results(attend, made, pattern), results(reference, made, pattern), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), sides=sides_and_pattern)
def test_the_reference_equals_a_loop_over_queries_and_heads(
    seed: int, sides: tuple[list[tuple[int, int]], Pattern]
) -> None:
    """The oracle has one of its own: a sum over the keys that a query may see, in float64."""
    lengths, pattern = sides
    q, k, v, q_layout, kv_layout = make(seed, lengths, 2, 2, 8)
    got, maps = attend_reference(q, k, v, q_layout, kv_layout, pattern)
    starts = zip(q_layout.starts, kv_layout.starts)
    for index, ((m, n), (q_start, kv_start)) in enumerate(zip(lengths, starts)):
        for i in range(m):
            end = n - m + i + 1 if isinstance(pattern, Causal) else n
            for head in range(4):
                keys = k[kv_start : kv_start + end, head // 2].double()
                scores = keys @ q[q_start + i, head].double() / 8**0.5
                weights = scores.exp() / scores.exp().sum()
                wanted = weights @ v[kv_start : kv_start + end, head // 2].double()
                torch.testing.assert_close(got[q_start + i, head].double(), wanted, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(maps[index][head, i, :end].double(), weights, atol=1e-6, rtol=1e-5)
                assert not maps[index][head, i, end:].any()


def test_one_sequence_gives_the_bits_it_gives_among_others(rng: np.random.Generator) -> None:
    lengths = [int(n) for n in sorted(rng.integers(1, 30, 12))]
    q, k, v, layout, _ = make(int(rng.integers(2**31)), [(n, n) for n in lengths], 2, 2, 16)
    together = attend(q, k, v, layout, layout, Full())
    for start, length in zip(layout.starts, layout.lengths):
        rows = slice(start, start + length)
        alone = Layout((length,))
        assert torch.equal(attend(q[rows], k[rows], v[rows], alone, alone, Full()), together[rows])


def test_a_leaked_mask_is_caught(rng: np.random.Generator) -> None:
    """The mutant: all sequences as one. The check of the tests above must refuse it."""

    def leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: Layout, b: Layout, p: Pattern) -> torch.Tensor:
        return attend(q, k, v, Layout((a.num_rows,)), Layout((b.num_rows,)), p)

    made = make(int(rng.integers(2**31)), [(9, 9), (12, 12)], 2, 1, 8)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(
            results(leaking, made, Full())[0], results(reference, made, Full())[0], atol=2e-5, rtol=1e-5
        )


def test_a_causal_mask_one_too_wide_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(int(rng.integers(2**31)), [(5, 9), (4, 12)], 2, 1, 8)
    wanted = results(reference, made, Causal())[0]
    monkeypatch.setattr(grouped, "visible", lambda _, m, n, *rest: torch.ones(m, n).tril(n - m + 1).bool())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(results(attend, made, Causal())[0], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Full(), Causal()])
@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("head_width", [16, 24, 32, 64])
@pytest.mark.parametrize("is_even", [False, True], ids=["ragged", "even"])
def test_kernels_on_cuda_equal_the_reference_in_bf16(
    is_even: bool, pattern: Pattern, share: int, head_width: int, rng: np.random.Generator
) -> None:
    """Of variable lengths, and where all are equally long."""
    lengths = [(m, m + extra) for m, extra in rng.integers(1, 90, (7, 2)).tolist()]
    if is_even:
        lengths = [(int(rng.integers(3, 90)),) * 2] * 7
    made = make(int(rng.integers(2**31)), lengths, 2, share, head_width, "cuda")
    exact = [x.cuda().bfloat16().float() for x in made[:3]]
    half = [x.bfloat16() for x in exact]
    wanted = results(reference, (*exact, *made[3:]), pattern)
    for got, want in zip(results(attend, (*half, *made[3:]), pattern), wanted, strict=True):
        # bf16 keeps 8 bits; gradients are sums of up to 180 products of such
        torch.testing.assert_close(got.float(), want, atol=6e-2, rtol=5e-2)
