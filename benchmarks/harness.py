"""Programs raced on the same work: timed in turn, round by round, in one process; a result file and a picture.

Machines are noisy, so what counts is the ratio of two programs within a round, its median and its spread. Whatever is
raced has been checked to give the same numbers first (`agree`).
"""

import datetime
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """What every benchmark may be asked.

    Attributes:
        rounds: timed rounds, after one that is not counted.
        device: cpu or cuda.
        is_quick: less work, to see that a benchmark runs; its figures mean little.
        shared: folder of real data by domain; None to take what is bundled.
    """

    rounds: int = 5
    device: str = "cpu"
    is_quick: bool = False
    shared: Path | None = None

    def data(self, name: str) -> Path | None:
        """A file of the shared data, where it is there."""
        path = self.shared / name if self.shared is not None else None
        return path if path is not None and path.exists() else None


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        title: what was compared.
        setting: shapes, input, precision, and what was checked to agree before.
        seconds: of each round, by program.
        reference: the program that ratios are taken to; a ratio above 1 says that it is faster.
        work: how much is done in a run, in `unit`.
        notes: sentences under the table.
        values: figures that are no times, by name.
    """

    title: str
    setting: str
    seconds: Mapping[str, Sequence[float]]
    reference: str = "meristem"
    work: float = 0.0
    unit: str = "tokens"
    notes: Sequence[str] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    def ratios(self, program: str) -> list[float]:
        """How many times as long a program took as the reference did, round by round."""
        return [theirs / ours for theirs, ours in zip(self.seconds[program], self.seconds[self.reference])]

    def table(self) -> list[str]:
        """The finding as a table of Markdown."""
        rate = f" {self.unit}/s |" if self.work else ""
        rows = [
            f"| program | seconds, median |{rate} times as long as {self.reference}: median (least to most) |",
            f"| --- | --- |{' --- |' if self.work else ''} --- |",
        ]
        for name, seconds in self.seconds.items():
            middle, ratios = statistics.median(seconds), self.ratios(name)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            speed = f" {self.work / middle:,.{0 if self.work > 10 * middle else 2}f} |" if self.work else ""
            rows.append(f"| {name} | {middle:.3g} |{speed} {spread} |")
        if self.values:
            rows += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in self.values.items())]
        return rows


def race(programs: Mapping[str, Callable[[], Any]], options: Options, is_warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each round, by program.

    Args:
        programs: what is run; each round runs all of them, in this order and the next time in the opposite one.
        is_warm: all have just been run, so that no round is spent on warming up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(0 if is_warm else -1, options.rounds):
        for name, run in list(programs.items())[:: 1 if turn % 2 == 0 else -1]:
            took = timed(run, options.device)
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one run, until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], Any]) -> int:
    """What a run holds at most beside what was there: of Python, numpy and Arrow."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def agree(what: str, ours: Any, theirs: Any, within: float, is_rounded: bool = False) -> float:
    """The largest difference of two arrays, if it is small enough.

    Args:
        is_rounded: values keep few bits, so that the largest of many differences says little: it is the root of the
            mean square that must be small.

    Raises:
        AssertionError: the programs do not compute the same, so there is nothing to time.
    """
    arrays = [np.asarray(value.detach().float().cpu() if torch.is_tensor(value) else value) for value in (ours, theirs)]
    away = np.abs(arrays[0] - arrays[1])
    worst = float(np.sqrt(np.square(away).mean()) if is_rounded else away.max())
    assert worst <= within, f"{what}: results differ by {worst:.2e}, more than {within:.0e}; nothing was timed"
    return worst


def hardware(device: str) -> str:
    """A word for file names: the threads of a CPU, or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0].replace(" ", "-")
    return f"cpu{torch.get_num_threads()}"


def machine(device: str) -> str:
    """The machine in a sentence."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__.split('+')[0]}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    units = [
        unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if unit in flags
    ]
    return f"{names[0] if names else platform.machine()} ({', '.join(units)})"


def write(theme: str, findings: Iterator[Finding] | Sequence[Finding], options: Options) -> Path:
    """Write findings as `results/<theme>_<hardware>_<date>.md`, `.json` and `.png`, anew with each one that comes."""
    stem = RESULTS / f"{theme}_{hardware(options.device)}_{datetime.date.today():%Y-%m-%d}"
    lines = [
        f"# {theme.capitalize()}",
        "",
        f"{machine(options.device)}. Programs ran in turn, in one process, {options.rounds} rounds.",
    ]
    done: list[Finding] = []
    for finding in findings:
        part = ["", f"## {finding.title}", "", finding.setting, "", *finding.table()]
        part += ["", *finding.notes] if finding.notes else []
        print("\n".join(part), flush=True)
        lines += part
        done.append(finding)
        if not options.is_quick:
            RESULTS.mkdir(exist_ok=True)
            stem.with_suffix(".md").write_text("\n".join([*lines, ""]))
            stem.with_suffix(".json").write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n")
            _draw(done, stem.with_suffix(".png"))
    print("\nquick: nothing is written" if options.is_quick else f"\nwritten to {stem}.md, .json and .png")
    return stem


def _draw(findings: Sequence[Finding], path: Path) -> None:
    """Bars of how many times as long each program takes, with the spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(finding.seconds) + 1.5 for finding in findings]
    figure, axes = plt.subplots(
        len(findings), 1, figsize=(9, 0.34 * sum(heights) + 0.6), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, finding in zip(axes[:, 0], findings):
        names = list(finding.seconds)
        ratios = [finding.ratios(name) for name in names]
        middles = [statistics.median(values) for values in ratios]
        errors = [[m - min(v) for m, v in zip(middles, ratios)], [max(v) - m for m, v in zip(middles, ratios)]]
        colors = ["#3a7d44" if name.startswith("meristem") else "#b0b7bf" for name in names]
        axis.barh(names, middles, xerr=errors, color=colors, error_kw={"lw": 1, "ecolor": "#444"})
        axis.axvline(1.0, color="#444", lw=0.8)
        axis.invert_yaxis()
        axis.set_title(finding.title, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("times as long (least to most)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
