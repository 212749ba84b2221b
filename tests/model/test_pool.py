"""Pools leave out special rows, wherever they stand; a GPU's one kernel reduces as a CPU does one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packs import config

from meristem.framing import frame_of, payload_parts
from meristem.model import pool as pools
from meristem.model.config import Attention, AttentionPool, Max, Mean, Pool, Prefix
from meristem.model.pool import _payload_rows, _together, build_pool, pool_rows
from meristem.types import Layout

POOLS = [Mean(), Max(), Prefix(), Prefix(count=2, has_mean=True)]
FRAMES = [(0, 0), (1, 1), (1, 0), (0, 2)]
PATTERNS = [*FRAMES, "gaps"]


def _rows(rng: np.random.Generator, special: tuple[int, int] | str) -> tuple[torch.Tensor, Layout]:
    """Some sequences that are nothing but special rows, and spare rows behind.

    Args:
        special: special rows before and behind each payload, or `gaps` for a third of all rows at random.
    """
    lengths = [2, *rng.integers(2, 9, 6).tolist(), 40]
    offsets = np.cumsum([0, *lengths])
    is_special = rng.random(offsets[-1]) < 1 / 3 if isinstance(special, str) else frame_of(offsets, special)
    is_special[: 2 * isinstance(special, str)] = True
    layout = Layout.of(lengths, min_rows=sum(lengths) + int(rng.integers(0, 5)), is_special=is_special)
    return torch.from_numpy(rng.standard_normal((layout.num_rows, 12), np.float32)), layout


def _slowly(pool: Pool, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Row by row."""
    vectors = []
    for start, length in zip(layout.starts, layout.lengths):
        own = [row for row in range(start, start + length) if row not in layout.special_rows]
        inner = x[own or list(range(start, start + length))]
        reduced = inner.amax(0) if isinstance(pool, Max) else inner.mean(0)
        if isinstance(pool, Prefix):
            reduced = torch.cat([x[start : start + pool.count].flatten(), *([reduced] if pool.has_mean else [])])
        vectors.append(reduced)
    return torch.stack(vectors)


@pytest.mark.parametrize("special", PATTERNS, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_together_and_one_by_one_are_those_of_row_by_row(
    pool: Pool, special: tuple[int, int] | str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layout = _rows(rng, special)
    results = []
    for reduce, way in ((_slowly, pools._one_by_one), (pool_rows, pools._one_by_one), (pool_rows, _together)):
        monkeypatch.setattr(pools, "_one_by_one", way)
        own = x.clone().requires_grad_()
        vectors = reduce(pool, own, layout)
        (vectors * torch.arange(1.0, vectors.numel() + 1).view_as(vectors)).sum().backward()
        results.append((vectors.detach(), own.grad))
    for expected, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_means_of_framed_payloads_are_those_of_slices_bit_for_bit(
    frame: tuple[int, int], rng: np.random.Generator
) -> None:
    x, layout = _rows(rng, frame)
    before, behind = frame
    for vector, start, length in zip(pool_rows(Mean(), x, layout), layout.starts, layout.lengths):
        own = x[start : start + length]
        inner = own[before : length - behind] if length > before + behind else own
        assert torch.equal(vector, inner.mean(0))


def test_attention_pools_see_the_rows_of_payloads_alone(rng: np.random.Generator) -> None:
    x, layout = _rows(rng, "gaps")
    pool = build_pool(
        AttentionPool(num_heads=2, feedforward_width=8, has_special=False),
        config(width=12, attention=Attention(num_heads=2)),
    )
    kept, inner = _payload_rows(x[:, None], layout)
    assert not inner.special_rows
    expected = pool(kept[:, 0], inner)
    torch.testing.assert_close(pool(x, layout), expected, atol=1e-6, rtol=1e-6)
    beside = x.clone()
    for start, length, part in zip(layout.starts, layout.lengths, payload_parts(layout)):
        has_payload = len(np.arange(length)[part]) > 0
        beside[[row for row in layout.special_rows if has_payload and start <= row < start + length]] += 5
    torch.testing.assert_close(pool(beside, layout), expected, atol=1e-6, rtol=1e-6)


def test_special_rows_that_are_counted_in_are_caught(rng: np.random.Generator) -> None:
    """Mutant: the last special row is part of the mean."""
    x, layout = _rows(rng, (1, 1))
    wrong = replace(layout, special_rows=layout.special_rows[:-1])
    assert not torch.allclose(pool_rows(Mean(), x, layout), pool_rows(Mean(), x, wrong), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("special", PATTERNS, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_on_a_gpu_vectors_are_those_of_the_cpu(
    pool: Pool, special: tuple[int, int] | str, rng: np.random.Generator
) -> None:
    x, layout = _rows(rng, special)
    got = pool_rows(pool, x.cuda(), layout.to(torch.device("cuda")))
    torch.testing.assert_close(got.cpu(), pool_rows(pool, x, layout), atol=1e-5, rtol=1e-5)
