"""What padding would add, and what memory `meristem embed` takes as its input grows.

    python benchmarks/run.py memory

Fill is counted, not timed: the share of rows that hold a token, in our packs and in batches as people make them. The
command is run on 500, 1,000 and 2,000 copies of a model's input in a process of its own each time; memory is its peak.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from embedding import by_budget, in_order, proteins
from harness import Finding, Options

from meristem.data.order import plan_in_order
from meristem.data.pack import pack_column
from meristem.domain import load_domain
from meristem.model.config import Attention, Embedding, FeedForward, Rotary, TransformerConfig
from meristem.model_directory import ModelCard, save_model

RECORDS = (500, 1000, 2000)


def findings(options: Options) -> Iterator[Finding]:
    """Fill of packs and batches; peaks and seconds of the command."""
    yield packing(options)
    yield command(options)


def packing(options: Options) -> Finding:
    column, where = proteins(options, 200 if options.is_quick else 4000)
    tokens, by_length = int(column.offsets[-1]), np.argsort(column.lengths, kind="stable")
    batches = {f"{size} a batch, file order": in_order(len(column), size) for size in (8, 32)}
    batches |= {f"sorted, {budget:,} tokens": by_budget(column, by_length, budget) for budget in (4096, 16384)}
    fill = {how: tokens / sum(len(rows) * int(column.lengths[rows].max()) for rows in b) for how, b in batches.items()}
    plan = plan_in_order(column.lengths, 4096)
    rows = sum(pack_column(column, plan[i], plan[i].tolist()).layout.num_rows for i in range(len(plan)))
    seconds = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        plan = plan_in_order(column.lengths, 4096)
        for i in range(len(plan)):
            pack_column(column, plan[i], plan[i].tolist())
        seconds.append(time.perf_counter() - began)
    return Finding(
        "Packing",
        f"{len(column):,} records of {where}, {tokens:,} tokens; packs of 4,096 are planned and laid out.",
        {"meristem": seconds},
        work=tokens,
        values={
            "fill of packs": f"{tokens / rows:.4f}",
            **{f"fill, padded, {how}": f"{f:.3f}" for how, f in fill.items()},
        },
    )


def command(options: Options) -> Finding:
    """`meristem embed` of a small model, so that what grows is not hidden by what a large one takes."""
    domain = load_domain("protein")
    config = TransformerConfig(
        width=64,
        num_layers=2,
        embedding=Embedding(vocab_size=len(domain.tokenizer().vocab)),
        position=Rotary(),
        attention=Attention(num_heads=4),
        feedforward=FeedForward(width=256),
    )
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        card = ModelCard(config, domain.tokenizer(), domain="protein")
        save_model(Path(folder) / "model", card, card.build())
        for count in RECORDS[:1] if options.is_quick else RECORDS:
            rng = np.random.default_rng(count)
            fasta = Path(folder) / f"{count}.fasta"
            fasta.write_text("".join(f">{i}\n{rng.choice(letters, 300).tobytes().decode()}\n" for i in range(count)))
            name = f"meristem embed, {count:,} records"
            seconds[name] = []
            for turn in range(min(options.rounds, 3)):
                took, peak = run_command([f"{folder}/model", str(fasta), "--output", f"{folder}/out{count}_{turn}"])
                seconds[name].append(took)
                peaks[f"peak, {name}"] = f"{peak / 1e6:,.0f} MB"
    return Finding(
        "The command, whole",
        "2 layers of width 64, 300 residues a record; seconds from start to end of a process, imports included.",
        seconds,
        reference=next(iter(seconds)),
        unit="records",
        values=peaks,
    )


def run_command(arguments: list[str]) -> tuple[float, int]:
    """Seconds, and bytes at the peak, of `meristem embed` in a process of its own."""
    code = (
        "import sys; from meristem.cli.main import main; code = main(['embed', *sys.argv[1:]]); "
        "print(open('/proc/self/status').read()); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    return seconds, int(kib) * 1024
