"""Processes that are killed while they work."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def parts_in(folder: Path) -> int:
    """Finished parts of an output."""
    return len(list(folder.glob("part-*.parquet")))


def kill_at_random_moments(
    command: Sequence[str], parts: Path, count: int, longest: float, rng: np.random.Generator
) -> None:
    """Start a command `count` times and kill it each time, after it has added to the folder `parts`.

    It waits until a part is there, whatever the start takes, then strikes at any moment of the next `longest` seconds:
    also while a part is written.
    """
    for _ in range(count):
        had = parts_in(parts)
        process = subprocess.Popen(
            command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and parts_in(parts) <= had:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, longest)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the input must be long enough for all kills"


def finish(command: Sequence[str]) -> None:
    """Run a command to its end."""
    last = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
