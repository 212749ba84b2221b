"""A run that is stopped at any moment and started again is the run that was never stopped, bit for bit."""

import signal
import time

import numpy as np
import pytest

STEPS_AT_LEAST = 30


def _kill_somewhere(bench, rng: np.random.Generator, number: int, *arguments: str) -> int:
    """Start the run, let it come some way, and kill it wherever it is; how many rows it had written."""
    metrics = bench.path / "broken" / "metrics.csv"
    size = metrics.stat().st_size if metrics.exists() else 0
    process = bench.start("--run_dir", "broken", *arguments)
    began = time.monotonic()
    # wait until this leg itself has taken a step: a kill while modules are imported proves nothing
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size == size):
        assert time.monotonic() - began < 120
        time.sleep(0.002)
    time.sleep(float(rng.uniform(0.0, 0.25)))  # a step takes about 30 ms, so this is somewhere in the next few
    process.send_signal(number)
    process.wait(120)
    return len(bench.rows("broken"))


@pytest.mark.slow
def test_killed_three_times_losses_are_those_of_an_unbroken_run(bench, rng):
    whole = bench.run("--run_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    reached = [_kill_somewhere(bench, rng, signal.SIGKILL) for _ in range(3)]
    print(f"killed at rows {reached}")
    last = bench.run("--run_dir", "broken")
    assert last.returncode == 0, last.stderr
    assert bench.rows("broken") == bench.rows("whole")
    assert len(bench.rows("whole")) == 40
    for name in ("model", "model-last"):
        weights = [(bench.path / run / name / "model.safetensors").read_bytes() for run in ("whole", "broken")]
        assert weights[0] == weights[1]
