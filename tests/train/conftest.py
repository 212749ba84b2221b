"""A tiny run in a folder of its own, started as a user would."""

import contextlib
import csv
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from random_proteins import random_proteins

from meristem.cli.main import main

CONFIG = """
model:
  architecture:
    width: 32
    num_layers: 2
    embedding: {mask_dropout_frac: 0.12}
    attention: {num_heads: 4, dropout: 0.1}
    feedforward: {width: 64, dropout: 0.1}
    head: {}
  dropout: 0.1
  objective: {class_path: MaskedTokens}
  optimizer: {lr: 1e-3, warmup_steps: 5}
data:
  domain: protein
  sources: proteins.fasta
  tokens_per_batch: 256
  split: {validation_frac: 0.2}
trainer: {max_steps: 40, accumulate_grad_batches: 2, accelerator: cpu}
watch: {validate_every_n_steps: 7, save_every_n_steps: 3}
"""


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Bench:
    """A folder with a config and proteins, and the command line in it."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "tiny.yaml"
        self.config.write_text(CONFIG)

    def replace(self, old: str, new: str) -> None:
        """Change the config."""
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def run(self, *arguments: str, verb: str = "fit", config: str = "tiny.yaml") -> Done:
        """In this process: imports are paid for once."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([verb, "--config", config, *arguments])
        return Done(code, out.getvalue(), err.getvalue())

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """In a process that can be killed."""
        return subprocess.Popen(
            [sys.executable, "-m", "meristem.cli.main", "fit", "--config", "tiny.yaml", *arguments],
            cwd=self.path,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # as `run`, to the bit
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def rows(self, run: str) -> list[dict[str, str]]:
        """Rows of `metrics.csv` without what depends on the clock."""
        with (self.path / run / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.fixture
def bench(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Bench:
    proteins = random_proteins(rng, 100)
    fasta = "".join(f">protein{i}\n{sequence}\n" for i, sequence in enumerate(proteins))
    (tmp_path / "proteins.fasta").write_text(fasta)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    return Bench(tmp_path)
