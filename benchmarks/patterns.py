"""How the cost of attention within a window grows with the length of a sequence, on a CPU.

    python benchmarks/run.py patterns

A causal window of 256 tokens (a query sees itself and 255 keys before it), 8 heads of 64, fp32: one sequence of 4,096
to 32,768 tokens. The result is checked against the reference before anything is timed. Times are those of the CPU, of
all threads, so that other work of the machine counts little, and stand for 4,096 tokens of each sequence: a ratio of 1
is linear cost. Memory is the peak of a process of its own for each length, over what it held before there were queries.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Finding, Options, agree

from meristem.model.config import Causal, Window
from meristem.model.kernels import Packed, Scoring, attend, attend_reference
from meristem.types import Layout

LENGTHS = (4096, 8192, 16_384, 32_768)
PATTERN = Causal() & Window(left=255)
NUM_HEADS, HEAD_WIDTH = 8, 64
WAYS = ("forward", "forward and backward")
TOLERANCE = 1e-5


def findings(options: Options) -> Iterator[Finding]:
    """Forward alone, and with the gradient."""
    tensors, layout = inputs(1024), Layout((1024,))
    wanted, _ = attend_reference(Packed(*tensors, layout, layout), Scoring(PATTERN))
    worst = agree("window", attend(Packed(*tensors, layout, layout), Scoring(PATTERN)), wanted, TOLERANCE)
    lengths = LENGTHS[:2] if options.is_quick else LENGTHS
    first = lengths[0]
    for way in WAYS:
        seconds: dict[str, list[float]] = {f"{length:,} tokens": [] for length in lengths}
        tensors_of = {length: inputs(length) for length in lengths}
        for turn in range(options.rounds + 1):
            for length in lengths:
                began = time.process_time()
                run(tensors_of[length], way)
                if turn:  # the first is the warm-up
                    seconds[f"{length:,} tokens"].append((time.process_time() - began) * first / length)
        peaks = {length: peak_in_a_process(length, way) for length in lengths}
        yield Finding(
            f"Window of 256, {way}",
            f"One sequence, {NUM_HEADS} heads of {HEAD_WIDTH}, fp32; CPU seconds for {first:,} tokens. At 1,024 "
            f"tokens the result differs from the dense reference by at most {worst:.1e}.",
            seconds,
            reference=f"{first:,} tokens",
            work=first,
            values={f"peak at {n:,} tokens": f"{peaks[n] / 1e6:,.0f} MB" for n in lengths}
            | {
                f"growth of memory over that of length, {n:,}": f"{peaks[n] / peaks[first] * first / n:.2f}"
                for n in lengths
            },
        )


def inputs(length: int) -> list[torch.Tensor]:
    """Queries, keys and values."""
    return [torch.randn(length, NUM_HEADS, HEAD_WIDTH) for _ in range(3)]


def run(tensors: list[torch.Tensor], way: str) -> None:
    layout = Layout((len(tensors[0]),))
    if way == "forward":
        with torch.inference_mode():
            attend(Packed(*tensors, layout, layout), Scoring(PATTERN))
    else:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.autograd.grad(attend(Packed(*leaves, layout, layout), Scoring(PATTERN)).sum(), leaves)


def peak_in_a_process(length: int, way: str) -> int:
    command = [sys.executable, __file__, str(length), way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_bytes(length: int, way: str) -> int:
    """Of this process, over what it holds before there are inputs."""
    run(inputs(1024), way)  # libraries take their own memory on first use
    before = held_bytes("VmRSS")
    run(inputs(length), way)
    return held_bytes("VmHWM") - before


def held_bytes(what: str) -> int:
    """Resident now, or at most so far. (`getrusage` would count the process that started this one.)"""
    [kib] = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return int(kib) * 1024


if __name__ == "__main__":
    print(peak_bytes(int(sys.argv[1]), sys.argv[2]))
