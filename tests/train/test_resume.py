"""A run that is stopped at any moment and started again is the run that was never stopped, bit for bit."""

import json
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from meristem.train.datamodule import DataModule
from meristem.train.task import Task


def _signal_at(bench, rng: np.random.Generator, number: int, row: int) -> tuple[int, int]:
    """Start the run, and signal it some moments after it wrote `row`; how many rows it left, and its exit code."""
    metrics = bench.path / "broken" / "metrics.csv"
    process = bench.start("--run_dir", "broken")
    began = time.monotonic()
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") <= row):
        assert time.monotonic() - began < 240
        time.sleep(0.001)
    time.sleep(float(rng.uniform(0.0, 0.06)))  # a step takes about 30 ms: somewhere in it, in saving or validation
    process.send_signal(number)
    code = process.wait(240)
    return len(bench.rows("broken")), code


@pytest.mark.slow
def test_killed_three_times_losses_are_those_of_an_unbroken_run(bench, rng):
    whole = bench.run("--run_dir", "whole")
    assert whole.code == 0, whole.err
    rows = np.sort(rng.choice(np.arange(2, 36), 3, replace=False))
    reached = [_signal_at(bench, rng, signal.SIGKILL, row) for row in rows]
    print(f"killed at rows {reached}")
    assert all(code == -signal.SIGKILL for _, code in reached)
    last = bench.run("--run_dir", "broken")
    assert last.code == 0, last.err
    assert bench.rows("broken") == bench.rows("whole")
    assert len(bench.rows("whole")) == 40
    for name in ("model", "model-last"):
        weights = [(bench.path / run / name / "model.safetensors").read_bytes() for run in ("whole", "broken")]
        assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_goes_on(bench, rng, number, expected_code):
    rows, code = _signal_at(bench, rng, number, int(rng.integers(1, 12)))
    assert code == expected_code
    step = json.loads((bench.path / "broken" / "run.json").read_text())["step"]
    # it saves at the end of its step; only in a validation (every seventh) it goes back to a third one
    assert step == rows or rows - step <= 3
    assert bench.run("--run_dir", "broken").code == 0
    assert bench.run("--run_dir", "whole").code == 0
    assert bench.rows("broken") == bench.rows("whole")


@pytest.mark.slow
def test_seed_decides_losses_and_workers_do_not(bench):
    bench.replace("max_steps: 40", "max_steps: 9")
    runs = {"a": [], "b": [], "workers": ["--data.workers", "2"], "other": ["--seed", "1"]}
    for name, arguments in runs.items():
        done = bench.run("--run_dir", name, *arguments)
        assert done.code == 0, done.err
    assert bench.rows("a") == bench.rows("b") == bench.rows("workers")
    assert all(one["loss"] != other["loss"] for one, other in zip(bench.rows("a"), bench.rows("other")))


MUTANTS: dict[str, tuple[type, str, Callable]] = {
    "dropout is not reseeded": (Task, "_reseed", lambda self, micro: None),
    "the loader begins at the first step": (DataModule, "first_step", lambda self: 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_going_on_with_a_known_fault_changes_losses(bench, monkeypatch, mutant):
    """The same comparison as above, at a stop between two steps: it must see each fault, and none without."""
    if mutant is not None:
        monkeypatch.setattr(*MUTANTS[mutant])
    bench.replace("warmup_steps: 5", "schedule: constant")  # so that max_steps may change
    assert bench.run("--run_dir", "broken", "--trainer.max_steps", "4").code == 0
    assert bench.run("--run_dir", "broken", "--trainer.max_steps", "8").code == 0
    assert bench.run("--run_dir", "whole", "--trainer.max_steps", "8").code == 0
    losses = [[row["loss"] for row in bench.rows(run)] for run in ("broken", "whole")]
    assert len(losses[0]) == len(losses[1]) == 8
    assert (losses[0] == losses[1]) == (mutant is None)
