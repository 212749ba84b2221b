"""What does not fit in memory is run in smaller packs, and nothing of it is lost."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import column_of, random_ids, tiny_model

from meristem.data.budget import is_out_of_memory
from meristem.errors import DataError
from meristem.inference import memory
from meristem.inference.engine import Embedder, TrunkRunner
from meristem.inference.memory import FEWEST_TOKENS, MOST_TOKENS, bytes_per_token, fitting_tokens

CPU = torch.device("cpu")


def test_packs_are_halved_until_they_fit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, column = tiny_model(), column_of([random_ids(rng, n) for n in rng.integers(2, 90, 60)])
    wanted = Embedder(TrunkRunner(model), "mean").embed(column)
    runner = TrunkRunner(model)
    run_pack, sizes = runner._run_pack, []

    def run(column, rows, wanted):
        sizes.append(int(column.lengths[rows].sum()))
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_pack(column, rows, wanted)

    monkeypatch.setattr(runner, "_run_pack", run)
    with caplog.at_level(logging.WARNING):
        got = Embedder(runner, "mean").embed(column)
    np.testing.assert_array_equal(got, wanted)
    assert max(sizes) > 300
    assert runner.tokens_per_batch <= max(sizes) / 2
    assert sum(size for size in sizes if size <= 300) == column.offsets[-1]
    assert "out of memory with" in caplog.text
    assert "going on with" in caplog.text


def test_a_sequence_that_does_not_fit_alone_is_named(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TrunkRunner(tiny_model())

    def run(column, rows, wanted):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "_run_pack", run)
    with pytest.raises(DataError, match="a sequence of 77 tokens does not fit in the memory of cpu"):
        Embedder(runner, "mean").embed(column_of([random_ids(rng, 75)]))


def test_another_error_is_not_taken_for_want_of_memory(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TrunkRunner(tiny_model())

    def run(column, rows, wanted):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(runner, "_run_pack", run)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Embedder(runner, "mean").embed(column_of([random_ids(rng, 5)]))


IN_LITTLE_MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
import numpy as np, torch
from small_models import column_of, random_ids, tiny_model
from meristem.inference.engine import Embedder, TrunkRunner
torch.set_num_threads(1)
torch.manual_seed(0)
model = tiny_model(width=64, num_heads=4)
column = column_of([random_ids(np.random.default_rng(0), 500) for _ in range(400)])
runner = TrunkRunner(model, tokens_per_batch=1000)
wanted = Embedder(runner, "mean").embed(column)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, used + 100_000_000))
runner = TrunkRunner(model, tokens_per_batch=1_000_000)
got = Embedder(runner, "mean").embed(column)
assert np.array_equal(got, wanted)
print(runner.tokens_per_batch)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a limit of memory needs Linux here")
def test_a_process_that_really_runs_out_of_memory_goes_on() -> None:
    code = IN_LITTLE_MEMORY.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 100_400
    assert "out of memory with 200,800 tokens at once on cpu" in done.stderr


def test_the_budget_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model().config
    each = bytes_per_token(config, torch.float32)
    assert bytes_per_token(config, torch.bfloat16) * 2 == each
    for at_hand, wanted in (
        (None, MOST_TOKENS["cpu"]),
        (10**12, MOST_TOKENS["cpu"]),
        (each * 2000, 1000),
        (0, FEWEST_TOKENS),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda device, at_hand=at_hand: at_hand)
        assert fitting_tokens(config, CPU, torch.float32) == wanted


def test_what_a_token_takes_is_not_underestimated(rng: np.random.Generator) -> None:
    """The peak of tensors alive, as the profiler counts them, is below the estimate and not far below."""
    model = tiny_model(width=64, num_heads=4)
    runner = TrunkRunner(model, tokens_per_batch=4096)
    column = column_of([random_ids(rng, 510) for _ in range(8)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        list(runner.run(column))
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    estimate = bytes_per_token(model.config, torch.float32) * 4096
    assert 0.3 * estimate < peak < 1.1 * estimate, (peak, estimate)


def test_memory_that_the_system_counts() -> None:
    at_hand = memory.available_bytes(CPU)
    assert at_hand is None or at_hand > 2**20
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
