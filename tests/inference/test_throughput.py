"""Throughput is a line in the length of sequences, fitted to what was timed."""

import numpy as np
import pytest
from small_models import tiny_model

from meristem.inference import throughput
from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.throughput import Throughput, measure_throughput
from meristem.model.config import Learned


@pytest.fixture
def embedder() -> Embedder:
    return Embedder(TrunkRunner(tiny_model(), tokens_per_batch=2048), "mean")


def test_the_line_is_found_again(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = lambda embedder, length, rounds: 1 / (2e-4 + 3e-7 * length)  # noqa: E731
    monkeypatch.setattr(throughput, "_tokens_per_second", rate)
    measured = measure_throughput(embedder)
    lengths = np.array([10, 500, 500, 900])
    wanted = sum(n * (2e-4 + 3e-7 * n) for n in lengths)
    assert measured.seconds(lengths) == pytest.approx(wanted, rel=1e-6)


def test_overheads_of_short_sequences_make_no_negative_time(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "_tokens_per_second", lambda embedder, length, rounds: 1e3 * length)
    assert measure_throughput(embedder).seconds(np.array([1, 5000])) > 0


def test_lengths_end_where_positions_do() -> None:
    model = tiny_model(position=Learned(max_positions=130, offset=2))
    measured = measure_throughput(Embedder(TrunkRunner(model, tokens_per_batch=512), "mean"), rounds=1)
    assert list(measured.tokens_per_second) == [64, 128]
    assert isinstance(measured, Throughput)
