"""How the cost of attention within a window grows with the length of a sequence, on a CPU.

    python benchmarks/patterns.py [--rounds 5]

A causal window of 256 tokens (a query sees itself and 255 keys before it), 8 heads of 64, fp32: one sequence of 4,096
to 32,768 tokens. The result is checked against the reference before anything is timed; then the lengths run in turn,
and the ratio of their CPU times (of all threads, so that other work of the machine counts little) is taken round by
round. Memory is the peak of a process of its own for each length, over what it held before its queries, keys and
values were made. Writes `benchmarks/results/patterns_<hardware>_<date>.md`.
"""

import argparse
import datetime
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from meristem.model.config import Causal, Window
from meristem.model.kernels import attend, attend_reference
from meristem.types import Layout

RESULTS = Path(__file__).parent / "results"
LENGTHS = (4096, 8192, 16_384, 32_768)
PATTERN = Causal() & Window(left=255)
NUM_HEADS, HEAD_WIDTH = 8, 64
WAYS = ("forward", "forward and backward")
TOLERANCE = 1e-5
ALLOWED = 1.3
"""Times the ratio of lengths that time and memory may grow by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("LENGTH", "WAY"), help="print the peak of one run, in bytes")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        print(peak_bytes(int(args.peak[0]), args.peak[1]))
        return

    tensors = inputs(1024)
    layout = Layout((1024,))
    wanted, _ = attend_reference(*tensors, layout, layout, PATTERN)
    worst = (attend(*tensors, layout, layout, PATTERN) - wanted).abs().max().item()
    assert worst <= TOLERANCE, f"the result differs by {worst}; nothing was timed"

    tables = []
    for way in WAYS:
        seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
        tensors_of = {length: inputs(length) for length in LENGTHS}
        for turn in range(args.rounds + 1):
            for length in LENGTHS:
                began = time.process_time()
                run(tensors_of[length], way)
                if turn:  # the first is the warm-up
                    seconds[length].append(time.process_time() - began)
        peaks = {length: peak_in_a_process(length, way) for length in LENGTHS}
        tables += ["", f"## {way.capitalize()}", "", *rows(seconds, peaks)]
    write_report(tables, args.rounds, worst)


def inputs(length: int) -> list[torch.Tensor]:
    """Queries, keys and values."""
    return [torch.randn(length, NUM_HEADS, HEAD_WIDTH) for _ in range(3)]


def run(tensors: list[torch.Tensor], way: str) -> None:
    layout = Layout((len(tensors[0]),))
    if way == "forward":
        with torch.inference_mode():
            attend(*tensors, layout, layout, PATTERN)
    else:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.autograd.grad(attend(*leaves, layout, layout, PATTERN).sum(), leaves)


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


def peak_in_a_process(length: int, way: str) -> int:
    command = [sys.executable, __file__, "--peak", str(length), way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(seconds: dict[int, list[float]], peaks: dict[int, int]) -> list[str]:
    """A table: what a length costs, and by how much more than its length it grew."""
    first = LENGTHS[0]
    lines = [
        "| tokens | CPU seconds, median | tokens/s | growth of CPU time / of length: median (least to most) | peak, MB "
        "| growth of memory / of length |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for length, values in seconds.items():
        growth = [mine / theirs / (length / first) for mine, theirs in zip(values, seconds[first])]
        spread = f"{statistics.median(growth):.2f} ({min(growth):.2f} to {max(growth):.2f})"
        middle = statistics.median(values)
        memory = peaks[length] / peaks[first] / (length / first)
        lines.append(
            f"| {length:,} | {middle:.3f} | {length / middle:,.0f} | {spread} "
            f"| {peaks[length] / 1e6:,.0f} | {memory:.2f} |"
        )
        verdict = "within" if statistics.median(growth) <= ALLOWED and memory <= ALLOWED else "OVER"
    return [*lines, "", f"From {first:,} to {length:,} tokens: {verdict} the {ALLOWED} x that are allowed."]


def write_report(tables: list[str], rounds: int, worst: float) -> None:
    hardware = f"cpu{torch.get_num_threads()}"
    text = "\n".join(
        [
            "# Attention within a causal window of 256 tokens, by length",
            "",
            f"One sequence, {NUM_HEADS} heads of {HEAD_WIDTH}, fp32, {torch.get_num_threads()} threads, "
            f"{platform.machine()}, torch {torch.__version__}. At 1,024 tokens the result differs from the dense "
            f"reference by at most {worst:.1e}. {rounds} rounds, the lengths in turn, in one process; memory is the "
            "peak of a process of its own over what it held before the inputs were made (inputs and result included).",
            *tables,
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"patterns_{hardware}_{datetime.date.today():%Y-%m-%d}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
