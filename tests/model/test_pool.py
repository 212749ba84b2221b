"""What a GPU reduces in one kernel is what a CPU reduces one by one."""

import numpy as np
import pytest
import torch

from meristem.model.config import Max, Mean, Pool, Prefix
from meristem.model.pool import _one_by_one, _together, pool_rows
from meristem.types import Layout

POOLS = [Mean(), Max(), Prefix(), Prefix(count=2, has_mean=True)]
SPECIAL = [(0, 0), (1, 1), (1, 0), (0, 2)]


def _rows(rng: np.random.Generator) -> tuple[torch.Tensor, Layout]:
    """Some sequences that are nothing but special rows, and spare rows behind."""
    lengths = [2, *rng.integers(2, 9, 6).tolist(), 40]
    layout = Layout.of(lengths, min_rows=sum(lengths) + int(rng.integers(0, 5)))
    return torch.from_numpy(rng.standard_normal((layout.num_rows, 12), np.float32)), layout


@pytest.mark.parametrize("num_special", SPECIAL, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_together_and_one_by_one_are_the_same(
    pool: Pool, num_special: tuple[int, int], rng: np.random.Generator
) -> None:
    x, layout = _rows(rng)
    results = []
    for reduce in (_one_by_one, _together):
        own = x.clone().requires_grad_()
        vectors = reduce(pool, own, layout, num_special)
        (vectors * torch.arange(1.0, vectors.numel() + 1).view_as(vectors)).sum().backward()
        results.append((vectors.detach(), own.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_special_rows_that_are_counted_in_are_caught(rng: np.random.Generator) -> None:
    """Mutant: the last special row is part of the mean."""
    x, layout = _rows(rng)
    wanted, got = _one_by_one(Mean(), x, layout, (1, 1)), _together(Mean(), x, layout, (1, 0))
    assert not torch.allclose(wanted, got, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_on_a_gpu_vectors_are_those_of_the_cpu(pool: Pool, rng: np.random.Generator) -> None:
    x, layout = _rows(rng)
    wanted = pool_rows(pool, x, layout, (1, 1))
    got = pool_rows(pool, x.cuda(), layout.to(torch.device("cuda")), (1, 1))
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=1e-5)
