"""A vector never depends on its batch mates: bit for bit in fp32 on the CPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import column_of, random_ids, tiny_model

from meristem.inference.engine import Embedder, TrunkRunner
from meristem.model import exact
from meristem.model.config import FeedForward, Learned
from meristem.model.model import Model

SHAPES = {
    "head width 16, as ESM-2 8M": {"width": 64, "num_heads": 4},
    "head width 8": {"width": 32, "num_heads": 4},
    "head width 6": {"width": 36, "num_heads": 6, "feedforward": FeedForward(width=50)},
    "head width 10": {"width": 40, "num_heads": 4, "feedforward": FeedForward(width=100, activation="silu")},
    "gated GELU": {"width": 48, "num_heads": 2, "feedforward": FeedForward(width=65, is_gated=True)},
    "gated SiLU": {"width": 48, "num_heads": 2, "feedforward": FeedForward(width=65, is_gated=True, activation="silu")},
    "one head": {"width": 40, "num_heads": 1},
    "learned positions, windows": {"position": Learned(max_positions=130, offset=2)},
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def embed(model: Model, sequences: list[np.ndarray], pool: str, budget: int) -> list[np.ndarray]:
    embedder = Embedder(TrunkRunner(model, tokens_per_batch=budget), pool)
    column = column_of(sequences)
    return np.split(embedder.embed(column), np.cumsum(embedder.num_vectors(column))[:-1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=12),
    budget=st.sampled_from([1, 50, 300, 1000, 100_000]),
    pool=st.sampled_from(["mean", "max", "cls", "none"]),
)
def test_a_vector_is_the_same_alone_and_packed_with_any_others(
    shape: dict, threads: int, seed: int, lengths: list[int], budget: int, pool: str
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = tiny_model(**shape)
    sequences = [random_ids(rng, n) for n in lengths]
    alone = [embed(model, [ids], pool, 10)[0] for ids in sequences]
    order = rng.permutation(len(sequences))
    together = embed(model, [sequences[i] for i in order], pool, budget)
    for got, i in zip(together, order, strict=True):
        # no tolerance: each row or sequence goes through the same arithmetic
        assert np.array_equal(got, alone[i]), f"length {lengths[i]}: {np.abs(got - alone[i]).max():.1e} apart"


def test_the_number_of_threads_changes_no_bit(rng: np.random.Generator) -> None:
    sequences = [random_ids(rng, int(n)) for n in rng.integers(1, 300, 20)]
    model = tiny_model(width=64)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(np.concatenate(embed(model, sequences, "mean", 2000)))
    torch.set_num_threads(before)
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_a_kernel_without_spare_queries_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: short sequences whose queries do not fill a block round by the thread they fall to."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    model = tiny_model(width=32, num_heads=4)
    sequences = [random_ids(rng, 2 * int(n) + 1) for n in rng.integers(3, 14, 60)]

    def differences() -> int:
        alone = [embed(model, [ids], "none", 10)[0] for ids in sequences]
        together = embed(model, sequences, "none", 100_000)
        return sum(not np.array_equal(a, b) for a, b in zip(alone, together))

    assert differences() == 0
    monkeypatch.setattr(exact, "CPU_MIN_QUERIES", 0)
    found = differences()
    torch.set_num_threads(before)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # other processors may round alike either way
        assert found > 0


def test_bf16_stays_near_fp32(rng: np.random.Generator) -> None:
    model = tiny_model(width=64)
    column = column_of([random_ids(rng, int(n)) for n in rng.integers(5, 200, 10)])
    single, rounded = (
        Embedder(TrunkRunner(model, dtype=dtype), "mean").embed(column) for dtype in (torch.float32, torch.bfloat16)
    )
    # bf16 keeps 8 bits, 0.4 % a rounding; some dozen roundings in two layers
    assert np.abs(single - rounded).max() < 0.03 * np.sqrt((single**2).mean())
    again = Embedder(TrunkRunner(model), "mean").embed(column)
    assert np.array_equal(again, single), "the model's own weights must not have been rounded"
